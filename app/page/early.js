// Before the first paint, so that neither colours nor the side that text begins on change under the reader's eyes.
const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
const tongue = localStorage.getItem("words") ?? navigator.language.slice(0, 2);
if (tongue === "fa") Object.assign(document.documentElement, { lang: "fa", dir: "rtl" });
