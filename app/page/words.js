// Everything that the page itself says, in every language it speaks. One more language is one more member of
// WORDS, with the same names (a test compares them); its numbers, dates and names of languages come from the browser.

const EN = {
  language: "English",
  direction: "ltr",
  title: "CLASP search",
  skip: "Skip to the content",
  cancel: "Cancel",
  close: "Close",
  retry: "Try again",
  unreachable: "The service cannot be reached.",
  "unreachable.trying": "The service cannot be reached. Trying again…",
  reachable: "The service is back.",
  "error.id": "Request {id}",
  "error.unknown": "Something went wrong.",
  "nav.label": "Views",
  "nav.search": "Search",
  "nav.library": "Library",
  "nav.add": "Add recordings",
  "nav.theme": "Dark colours",
  "nav.key": "API key",
  "nav.words": "Language of this page",
  "nav.keys": "Keyboard",
  "search.label": "What was said?",
  "search.placeholder": "Ask in any language",
  "search.go": "Search",
  "search.lang": "Language of the question",
  "search.lang.auto": "Any language",
  "search.collection": "Collection",
  "search.collection.all": "All collections",
  "search.probable": "Only probable hits",
  "search.probable.not": "Nobody has measured what this model's scores mean, so hits cannot be told probable.",
  "search.play-on": "Play on after the passage",
  "search.microphone": "Ask by voice: hold, or press to start and stop",
  "search.listening": "Listening… release or press again to search",
  "search.sound": "Asked by voice",
  "search.like": "More like “{title}”",
  "search.like.at": "More like “{title}” at {at}",
  "search.clear": "Ask something else",
  "search.searching": "Searching…",
  "search.hits": { one: "{n} recording in {ms} ms", other: "{n} recordings in {ms} ms" },
  "search.spoken": { one: "{n} recording found; best: {title}", other: "{n} recordings found; best: {title}" },
  "search.none": "Nothing was found.",
  "search.none.probable": "Nothing that is probably right.",
  "search.none.probable.more": "Show what comes closest",
  "search.none.collection": "Only “{collection}” was searched.",
  "search.none.collection.more": "Search everything",
  "search.none.empty": "There are no searchable recordings yet.",
  "search.more": "More hits",
  "search.waiting": {
    one: "{n} recording is still being prepared and cannot be found yet.",
    other: "{n} recordings are still being prepared and cannot be found yet.",
  },
  "start.title": "Find what was said",
  "start.lead": "Ask in your own words and your own language. You hear the answer at the second where it is said.",
  "start.try": "Try one of these",
  "empty.title": "Let’s hear something",
  "empty.lead": "Drop recordings or whole folders anywhere on this page. They stay with this service.",
  "empty.samples": "No recordings at hand? Take ours: short ones, in several languages.",
  "empty.samples.go": "Add the samples",
  "empty.samples.failed": "The samples could not be fetched.",
  "empty.reading": "There is nothing here that you may see yet.",
  "hit.play": "Play",
  "hit.play.passage": "Play {passage}",
  "hit.pause": "Pause",
  "hit.around": "With {n} s before and after",
  "hit.like": "More like this",
  "hit.details": "Details",
  "hit.passages": { one: "{n} passage", other: "{n} passages" },
  "hit.heard": "What the model heard",
  "hit.said": "What is said",
  "hit.unplayable": "This browser cannot play this kind of recording.",
  "hit.download": "Download it",
  "score.best": "Very probably right",
  "score.good": "Probably right",
  "score.fair": "Perhaps",
  "score.poor": "Probably not",
  "score.unknown": "Cosine {cosine}",
  "score.means":
    "About {share} of best hits with this score are right, as measured of this model where every second question has an answer in the library.",
  "score.cosine": "Cosine of question and best passage: {cosine}",
  "score.unmeasured":
    "The cosine of the question and the best passage: 1 would be the very same, 0 nothing in common. No probability was measured for this kind of question.",
  "wave.seek": "Position in the recording",
  "wave.overview": "Position in the whole recording",
  "wave.play": "Play the passage {passage}",
  "microphone.none": "There is no microphone.",
  "microphone.refused": "This page may not use the microphone. The browser’s settings for this site can change that.",
  "microphone.insecure": "Browsers lend the microphone only over https, or on this very machine.",
  "microphone.unable": "This browser cannot record.",
  "microphone.short": "That was too short. Hold the button while you speak.",
  "microphone.silent": "Nothing could be heard.",
  "add.title": "Add recordings",
  "add.drop": "Drop files or folders here, or anywhere on the page",
  "add.files": "Choose files",
  "add.folder": "Choose a folder",
  "add.record": "Record",
  "add.record.stop": "Stop and add",
  "add.recording": "Recording, {at}",
  "add.recorded": "Recording of {when}",
  "add.lang": "Spoken language",
  "add.lang.none": "Not said",
  "add.lang.why": "Noted beside each recording. Some models hear better when they know it.",
  "add.collection": "Collection",
  "add.collection.default": "default",
  "drop.here": "Drop to add",
  "drop.into": "Drop to add to “{collection}”",
  "drop.not": "Your key may not add recordings.",
  "uploads.title": "Uploads",
  "uploads.summary": "{done} of {n} searchable",
  "uploads.failed": { one: "{n} failed", other: "{n} failed" },
  "uploads.interrupted": { one: "{n} interrupted", other: "{n} interrupted" },
  "uploads.clear": "Clear finished",
  "uploads.fold": "Fold or unfold the list",
  "uploads.more": { one: "and {n} more", other: "and {n} more" },
  "uploads.skipped": {
    one: "{n} file of the folder is no recording and was left out.",
    other: "{n} files of the folder are no recordings and were left out.",
  },
  "uploads.nothing": "There were no recordings in it.",
  "upload.waiting": "Waiting",
  "upload.sending": "Uploading, {percent}",
  "upload.pausing": { one: "The service is busy; again in {n} s", other: "The service is busy; again in {n} s" },
  "upload.lost": "No connection; goes on by itself",
  "upload.pending": "Safe; waiting in the queue",
  "upload.processing": "Embedding",
  "upload.ready": "Searchable",
  "upload.duplicate": "Was there already",
  "upload.failed": "Failed",
  "upload.interrupted": "Interrupted by a reload: drop the file again to go on",
  "upload.accepted": "Safe with the service",
  "upload.unreadable": "The file could not be read, or the connection broke again and again.",
  "upload.forget": "Remove {name} from this list",
  "library.title": "Library",
  "library.status": "Status",
  "library.all": "All",
  "library.lang": "Language",
  "library.lang.any": "Any",
  "library.named": "Exact title",
  "library.named.why": "The whole title, letter for letter",
  "library.apply": "Filter",
  "library.more": "Older ones",
  "library.none": "No recording is like that.",
  "library.unfilter": "Show all",
  "library.delete": "Delete these…",
  "library.listed": { one: "{n} recording shown", other: "{n} recordings shown" },
  "collection.counts": { one: "{n} recording", other: "{n} recordings" },
  "collection.failed": { one: "{n} failed", other: "{n} failed" },
  "status.pending": "Waiting",
  "status.processing": "Embedding",
  "status.ready": "Searchable",
  "status.failed": "Failed",
  "record.title": "Title",
  "record.lang": "Spoken language",
  "record.lang.hint": "A tag such as en, fa or pt-BR",
  "record.save": "Save",
  "record.saved": "Saved.",
  "record.changed": "Somebody changed it meanwhile. Here is how it is now.",
  "record.id": "Id",
  "record.status": "Status",
  "record.collection": "Collection",
  "record.duration": "Length",
  "record.segments": "Passages",
  "record.size": "Size",
  "record.type": "Kind",
  "record.created": "Added",
  "record.sha256": "SHA-256",
  "record.metadata": "Metadata",
  "record.json": "As JSON",
  "record.delete": "Delete",
  "record.gone": "This recording is not here, or not any more.",
  "delete.title": "Delete “{title}”?",
  "delete.why": "It is never found again, and cannot be brought back.",
  "delete.go": "Delete",
  "delete.done": "Deleted.",
  "delete.many.title": { one: "Delete {n} recording?", other: "Delete {n} recordings?" },
  "delete.many.none": "There is nothing to delete.",
  "delete.many.all": "No filter narrows it: this is everything that you can see.",
  "delete.many.filter": "All that the filters above choose, also those that are not listed yet.",
  "delete.many.type": "Type {n} to delete them.",
  "delete.many.at": { one: "{n} deleted…", other: "{n} deleted…" },
  "delete.many.done": { one: "{n} recording deleted.", other: "{n} recordings deleted." },
  "key.title": "API key",
  "key.why": "It goes into a cookie that no script can read, and is kept until the browser is closed.",
  "key.insecure": "Over plain http from another machine, browsers present no key. Open this page over https.",
  "key.label": "Key",
  "key.remember": "Keep it for 30 days",
  "key.use": "Use this key",
  "key.forget": "Forget the key",
  "key.known": "Signed in as “{name}” ({scopes}).",
  "key.taken": "The key is good.",
  "key.wrong": "This key is not valid (any more).",
  "key.needed": "This service wants an API key.",
  "key.reading": "Your key may add recordings, but not search.",
  "keys.title": "Keyboard",
  "keys.search": "To the search box",
  "keys.next": "Next and previous hit",
  "keys.play": "Play or pause",
  "keys.open": "Details",
  "keys.like": "More like this",
  "keys.seek": "Back and forth by two seconds, on a waveform",
  "keys.escape": "Silence; close; back to the search box",
  "keys.help": "This list",
};

const FA = {
  language: "فارسی",
  direction: "rtl",
  title: "جست‌وجوی کلسپ",
  skip: "رفتن به محتوا",
  cancel: "انصراف",
  close: "بستن",
  retry: "تلاش دوباره",
  unreachable: "سرویس در دسترس نیست.",
  "unreachable.trying": "سرویس در دسترس نیست. دوباره تلاش می‌شود…",
  reachable: "سرویس دوباره در دسترس است.",
  "error.id": "درخواست {id}",
  "error.unknown": "مشکلی پیش آمد.",
  "nav.label": "بخش‌ها",
  "nav.search": "جست‌وجو",
  "nav.library": "کتابخانه",
  "nav.add": "افزودن ضبط‌ها",
  "nav.theme": "رنگ‌های تیره",
  "nav.key": "کلید API",
  "nav.words": "زبان این صفحه",
  "nav.keys": "صفحه‌کلید",
  "search.label": "چه گفته شد؟",
  "search.placeholder": "به هر زبانی بپرسید",
  "search.go": "جست‌وجو",
  "search.lang": "زبان پرسش",
  "search.lang.auto": "هر زبانی",
  "search.collection": "مجموعه",
  "search.collection.all": "همهٔ مجموعه‌ها",
  "search.probable": "فقط نتایج محتمل",
  "search.probable.not": "معنای امتیازهای این مدل سنجیده نشده است؛ پس نمی‌توان گفت کدام نتیجه محتمل است.",
  "search.play-on": "ادامهٔ پخش پس از بخش یافته‌شده",
  "search.microphone": "پرسیدن با صدا: نگه دارید، یا برای شروع و پایان فشار دهید",
  "search.listening": "گوش می‌دهم… رها کنید یا دوباره فشار دهید",
  "search.sound": "پرسش با صدا",
  "search.like": "مانند «{title}»",
  "search.like.at": "مانند «{title}» در {at}",
  "search.clear": "پرسشی دیگر",
  "search.searching": "در حال جست‌وجو…",
  "search.hits": { one: "{n} ضبط در {ms} میلی‌ثانیه", other: "{n} ضبط در {ms} میلی‌ثانیه" },
  "search.spoken": { one: "{n} ضبط پیدا شد؛ بهترین: {title}", other: "{n} ضبط پیدا شد؛ بهترین: {title}" },
  "search.none": "چیزی پیدا نشد.",
  "search.none.probable": "نتیجه‌ای که احتمالاً درست باشد پیدا نشد.",
  "search.none.probable.more": "نزدیک‌ترین‌ها را نشان بده",
  "search.none.collection": "فقط «{collection}» جست‌وجو شد.",
  "search.none.collection.more": "جست‌وجو در همه",
  "search.none.empty": "هنوز ضبط قابل جست‌وجویی نیست.",
  "search.more": "نتایج بیشتر",
  "search.waiting": {
    one: "{n} ضبط هنوز آماده نشده است و فعلاً پیدا نمی‌شود.",
    other: "{n} ضبط هنوز آماده نشده‌اند و فعلاً پیدا نمی‌شوند.",
  },
  "start.title": "پیدا کنید چه گفته شد",
  "start.lead": "با کلمات خودتان و به زبان خودتان بپرسید. پاسخ را از همان ثانیه‌ای که گفته شده می‌شنوید.",
  "start.try": "یکی از این‌ها را امتحان کنید",
  "empty.title": "از شنیدن شروع کنیم",
  "empty.lead": "فایل‌های صوتی یا پوشه‌ها را هر جای این صفحه رها کنید. نزد همین سرویس می‌مانند.",
  "empty.samples": "ضبطی دم دست ندارید؟ نمونه‌های ما را بردارید: ضبط‌هایی کوتاه به چند زبان.",
  "empty.samples.go": "افزودن نمونه‌ها",
  "empty.samples.failed": "نمونه‌ها دریافت نشدند.",
  "empty.reading": "هنوز چیزی نیست که اجازهٔ دیدنش را داشته باشید.",
  "hit.play": "پخش",
  "hit.play.passage": "پخش {passage}",
  "hit.pause": "مکث",
  "hit.around": "با {n} ثانیه پیش و پس",
  "hit.like": "مانند این",
  "hit.details": "جزئیات",
  "hit.passages": { one: "{n} بخش", other: "{n} بخش" },
  "hit.heard": "آنچه مدل شنیده است",
  "hit.said": "آنچه گفته می‌شود",
  "hit.unplayable": "این مرورگر نمی‌تواند این نوع فایل را پخش کند.",
  "hit.download": "دریافت فایل",
  "score.best": "به احتمال بسیار درست",
  "score.good": "احتمالاً درست",
  "score.fair": "شاید",
  "score.poor": "احتمالاً نادرست",
  "score.unknown": "کسینوس {cosine}",
  "score.means":
    "حدود {share} از نتایج نخست با این امتیاز درست‌اند؛ بنا بر سنجش این مدل، وقتی پاسخ نیمی از پرسش‌ها در کتابخانه باشد.",
  "score.cosine": "کسینوس پرسش و بهترین بخش: {cosine}",
  "score.unmeasured":
    "کسینوس پرسش و بهترین بخش: ۱ یعنی عیناً همان، ۰ یعنی بی‌شباهت. برای این نوع پرسش احتمالی سنجیده نشده است.",
  "wave.seek": "جای پخش در ضبط",
  "wave.overview": "جای پخش در کل ضبط",
  "wave.play": "پخش بخش {passage}",
  "microphone.none": "میکروفونی پیدا نشد.",
  "microphone.refused": "این صفحه اجازهٔ استفاده از میکروفون ندارد. در تنظیمات مرورگر برای این سایت می‌توانید تغییرش دهید.",
  "microphone.insecure": "مرورگرها میکروفون را فقط با https یا روی همین دستگاه در اختیار می‌گذارند.",
  "microphone.unable": "این مرورگر نمی‌تواند ضبط کند.",
  "microphone.short": "خیلی کوتاه بود. هنگام صحبت دکمه را نگه دارید.",
  "microphone.silent": "صدایی شنیده نشد.",
  "add.title": "افزودن ضبط‌ها",
  "add.drop": "فایل یا پوشه را اینجا یا هر جای صفحه رها کنید",
  "add.files": "انتخاب فایل",
  "add.folder": "انتخاب پوشه",
  "add.record": "ضبط صدا",
  "add.record.stop": "پایان و افزودن",
  "add.recording": "در حال ضبط، {at}",
  "add.recorded": "ضبط {when}",
  "add.lang": "زبان گفتار",
  "add.lang.none": "گفته نشده",
  "add.lang.why": "کنار هر ضبط نوشته می‌شود. بعضی مدل‌ها اگر آن را بدانند بهتر می‌شنوند.",
  "add.collection": "مجموعه",
  "add.collection.default": "default",
  "drop.here": "برای افزودن رها کنید",
  "drop.into": "برای افزودن به «{collection}» رها کنید",
  "drop.not": "کلید شما اجازهٔ افزودن ندارد.",
  "uploads.title": "بارگذاری‌ها",
  "uploads.summary": "{done} از {n} قابل جست‌وجو",
  "uploads.failed": { one: "{n} ناموفق", other: "{n} ناموفق" },
  "uploads.interrupted": { one: "{n} ناتمام", other: "{n} ناتمام" },
  "uploads.clear": "پاک کردن تمام‌شده‌ها",
  "uploads.fold": "باز یا بسته کردن فهرست",
  "uploads.more": { one: "و {n} تای دیگر", other: "و {n} تای دیگر" },
  "uploads.skipped": {
    one: "{n} فایل پوشه صوتی نبود و کنار گذاشته شد.",
    other: "{n} فایل پوشه صوتی نبودند و کنار گذاشته شدند.",
  },
  "uploads.nothing": "فایل صوتی در آن نبود.",
  "upload.waiting": "در نوبت",
  "upload.sending": "در حال ارسال، {percent}",
  "upload.pausing": { one: "سرویس مشغول است؛ {n} ثانیهٔ دیگر دوباره", other: "سرویس مشغول است؛ {n} ثانیهٔ دیگر دوباره" },
  "upload.lost": "اتصال قطع است؛ خودش ادامه می‌یابد",
  "upload.pending": "رسید؛ در صف است",
  "upload.processing": "در حال تحلیل",
  "upload.ready": "قابل جست‌وجو",
  "upload.duplicate": "از پیش موجود بود",
  "upload.failed": "ناموفق",
  "upload.interrupted": "با بارگذاری دوبارهٔ صفحه ناتمام ماند: برای ادامه، فایل را دوباره رها کنید",
  "upload.accepted": "به سرویس رسید",
  "upload.unreadable": "فایل خوانده نشد، یا اتصال چند بار قطع شد.",
  "upload.forget": "حذف {name} از این فهرست",
  "library.title": "کتابخانه",
  "library.status": "وضعیت",
  "library.all": "همه",
  "library.lang": "زبان",
  "library.lang.any": "هر زبانی",
  "library.named": "عنوان دقیق",
  "library.named.why": "کل عنوان، حرف به حرف",
  "library.apply": "اعمال",
  "library.more": "قدیمی‌ترها",
  "library.none": "ضبطی با این ویژگی‌ها نیست.",
  "library.unfilter": "نمایش همه",
  "library.delete": "حذف این‌ها…",
  "library.listed": { one: "{n} ضبط", other: "{n} ضبط" },
  "collection.counts": { one: "{n} ضبط", other: "{n} ضبط" },
  "collection.failed": { one: "{n} ناموفق", other: "{n} ناموفق" },
  "status.pending": "در صف",
  "status.processing": "در حال تحلیل",
  "status.ready": "قابل جست‌وجو",
  "status.failed": "ناموفق",
  "record.title": "عنوان",
  "record.lang": "زبان گفتار",
  "record.lang.hint": "برچسبی مانند en، fa یا pt-BR",
  "record.save": "ذخیره",
  "record.saved": "ذخیره شد.",
  "record.changed": "در این میان کس دیگری آن را تغییر داد. اکنون چنین است.",
  "record.id": "شناسه",
  "record.status": "وضعیت",
  "record.collection": "مجموعه",
  "record.duration": "مدت",
  "record.segments": "بخش‌ها",
  "record.size": "اندازه",
  "record.type": "نوع",
  "record.created": "زمان افزودن",
  "record.sha256": "SHA-256",
  "record.metadata": "فراداده",
  "record.json": "به شکل JSON",
  "record.delete": "حذف",
  "record.gone": "این ضبط اینجا نیست، یا دیگر نیست.",
  "delete.title": "«{title}» حذف شود؟",
  "delete.why": "دیگر هرگز پیدا نمی‌شود و بازگرداندنی نیست.",
  "delete.go": "حذف",
  "delete.done": "حذف شد.",
  "delete.many.title": { one: "{n} ضبط حذف شود؟", other: "{n} ضبط حذف شود؟" },
  "delete.many.none": "چیزی برای حذف نیست.",
  "delete.many.all": "هیچ فیلتری محدودش نمی‌کند: این همهٔ چیزهایی است که می‌بینید.",
  "delete.many.filter": "همهٔ آنچه فیلترهای بالا برمی‌گزینند، حتی آنچه هنوز در فهرست نیامده است.",
  "delete.many.type": "برای حذف، عدد {n} را بنویسید.",
  "delete.many.at": { one: "{n} حذف شد…", other: "{n} حذف شد…" },
  "delete.many.done": { one: "{n} ضبط حذف شد.", other: "{n} ضبط حذف شد." },
  "key.title": "کلید API",
  "key.why": "در کوکی‌ای می‌ماند که هیچ اسکریپتی نمی‌خواند، تا وقتی مرورگر بسته شود.",
  "key.insecure": "روی http ساده و از دستگاهی دیگر، مرورگرها کلیدی نشان نمی‌دهند. این صفحه را با https باز کنید.",
  "key.label": "کلید",
  "key.remember": "۳۰ روز نگه دار",
  "key.use": "استفاده از این کلید",
  "key.forget": "فراموش کردن کلید",
  "key.known": "با نام «{name}» وارد شده‌اید ({scopes}).",
  "key.taken": "کلید درست است.",
  "key.wrong": "این کلید معتبر نیست (یا دیگر نیست).",
  "key.needed": "این سرویس کلید API می‌خواهد.",
  "key.reading": "کلید شما اجازهٔ افزودن دارد، نه جست‌وجو.",
  "keys.title": "صفحه‌کلید",
  "keys.search": "رفتن به کادر جست‌وجو",
  "keys.next": "نتیجهٔ بعدی و قبلی",
  "keys.play": "پخش یا مکث",
  "keys.open": "جزئیات",
  "keys.like": "مانند این",
  "keys.seek": "دو ثانیه عقب یا جلو، روی نمودار صدا",
  "keys.escape": "سکوت؛ بستن؛ بازگشت به کادر جست‌وجو",
  "keys.help": "همین فهرست",
};

export const WORDS = { en: EN, fa: FA };
/** Languages that are offered for questions and recordings; any other BCP 47 tag works in an address. */
export const LANGUAGES = [
  "ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it",
  "ja", "ko", "lt", "lv", "ms", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "sw", "ta", "th", "tr", "uk",
  "ur", "vi", "zh",
];

const listeners = [];
const root = document.documentElement;
export let tongue = WORDS[root.lang] ? root.lang : "en";

/** Speaks this language from now on, and the next time. Whoever shows words shows them anew. */
export function speak(lang) {
  tongue = lang;
  localStorage.setItem("words", lang);
  Object.assign(root, { lang, dir: WORDS[lang].direction });
  written();
  for (const listener of listeners) listener();
}

export function onSpeak(listener) {
  listeners.push(listener);
}

/** What stands in the page from the start: `data-say` is its text, `data-say-LABEL` an attribute. */
export function written() {
  document.title = say("title");
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const name of ["aria-label", "placeholder", "title"]) {
    for (const element of document.querySelectorAll(`[data-say-${name}]`)) {
      element.setAttribute(name, say(element.getAttribute(`data-say-${name}`)));
    }
  }
}

/** The words of that name. `n` chooses between one and several; numbers are written as the language does. */
export function say(name, values = {}) {
  let words = WORDS[tongue][name];
  if (typeof words === "object") words = words[new Intl.PluralRules(tongue).select(values.n)] ?? words.other;
  return words.replace(/\{(\w+)\}/g, (_, key) => (typeof values[key] === "number" ? number(values[key]) : values[key]));
}

export function number(value, options = {}) {
  return new Intl.NumberFormat(tongue, options).format(value);
}

export function percent(share) {
  return number(share, { style: "percent", maximumFractionDigits: 0 });
}

/** A probability, which is never written as certainty. */
export function probability(share) {
  return share < 0.01 ? `< ${percent(0.01)}` : share > 0.99 ? `> ${percent(0.99)}` : percent(share);
}

export function cosine(value) {
  return number(value, { minimumFractionDigits: 3, maximumFractionDigits: 3 });
}

/** Seconds as 0:07, 12:05 or 1:02:03. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds + 1e-6));
  const two = (value) => number(value, { minimumIntegerDigits: 2, useGrouping: false });
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return `${hours ? `${number(hours)}:${two(minutes)}` : number(minutes)}:${two(whole % 60)}`;
}

/** From when to when, as 0:07–0:12. */
export function passage({ start_s, end_s }) {
  return `${clock(start_s)}–${clock(end_s)}`;
}

/** How long something is in all, as 5 min or 3.2 hr. */
export function length(seconds) {
  const [value, unit] = seconds < 100 ? [seconds, "second"] : seconds < 6000 ? [seconds / 60, "minute"] : [seconds / 3600, "hour"];
  return number(value, { style: "unit", unit, maximumFractionDigits: unit === "hour" ? 1 : 0 });
}

export function size(bytes) {
  const [value, unit] = bytes < 1e3 ? [bytes, "byte"] : bytes < 1e6 ? [bytes / 1e3, "kilobyte"] : bytes < 1e9 ? [bytes / 1e6, "megabyte"] : [bytes / 1e9, "gigabyte"];
  return number(value, { style: "unit", unit, maximumFractionDigits: value < 10 ? 1 : 0 });
}

export function when(time, style = "medium") {
  return new Intl.DateTimeFormat(tongue, { dateStyle: style, timeStyle: "short" }).format(new Date(time));
}

/** A language's name in the page's own. */
export function languageName(tag) {
  try {
    return new Intl.DisplayNames(tongue, { type: "language" }).of(tag) ?? tag;
  } catch {
    return tag;
  }
}

/** What an error says to a person. */
export function told(problem) {
  return problem.code === "unreachable" ? say("unreachable") : problem.message || say("error.unknown");
}

/** What a recording is called: its title, or else its id. */
export function titleOf(recording) {
  const title = recording.metadata?.title;
  return typeof title === "string" && title.trim() ? title : recording.id;
}
