BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0007');
CREATE TABLE api_keys (
	id TEXT NOT NULL, 
	name TEXT NOT NULL, 
	sha256 TEXT NOT NULL, 
	scopes JSON NOT NULL, 
	collections JSON, 
	created_at DATETIME NOT NULL, 
	revoked_at DATETIME, rate TEXT, max_recordings BIGINT, max_bytes BIGINT, max_hours FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
CREATE TABLE changes (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	recording INTEGER NOT NULL, 
	token TEXT NOT NULL
, model TEXT);
INSERT INTO "changes" VALUES(1,1,'0000000000000001',NULL);
INSERT INTO "changes" VALUES(2,2,'0000000000000002',NULL);
INSERT INTO "changes" VALUES(3,3,'0000000000000003',NULL);
INSERT INTO "changes" VALUES(4,9,'0000000000000009',NULL);
CREATE TABLE library (
	"row" INTEGER NOT NULL, 
	id TEXT NOT NULL, 
	PRIMARY KEY ("row")
);
CREATE TABLE models (
	fingerprint TEXT NOT NULL, 
	name TEXT NOT NULL, 
	dim INTEGER NOT NULL, 
	state TEXT NOT NULL, 
	hold_until FLOAT, 
	kept_until FLOAT, 
	PRIMARY KEY (fingerprint)
);
INSERT INTO "models" VALUES('0123456789abcdef','spectral',16,'active',NULL,NULL);
CREATE TABLE once (
	name TEXT NOT NULL, 
	request TEXT NOT NULL, 
	recording BIGINT NOT NULL, 
	id TEXT NOT NULL, 
	created BOOLEAN NOT NULL, 
	created_at DATETIME NOT NULL, 
	kept_until FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE "recordings" (
	"key" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id TEXT NOT NULL, 
	collection TEXT NOT NULL, 
	sha256 TEXT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	media_type TEXT, 
	lang TEXT, 
	metadata JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	status TEXT NOT NULL, 
	duration_s FLOAT, 
	segments INTEGER, 
	model TEXT, 
	error_code TEXT, 
	error_detail TEXT, 
	attempts INTEGER NOT NULL, 
	lease_owner TEXT, 
	lease_until FLOAT, uploaded_by TEXT, 
	UNIQUE (collection, sha256), 
	CONSTRAINT recordings_by_id UNIQUE (id, collection)
);
INSERT INTO "recordings" VALUES(1,'one','default','7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',3,'audio/wav','fa','{"name": "one", "\u0646\u0627\u0645": 1}','2026-01-01 00:00:00.000000','ready',2.0,2,'0123456789abcdef',NULL,NULL,1,NULL,NULL,NULL);
INSERT INTO "recordings" VALUES(2,'two','default','3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',3,'audio/wav','fa','{"name": "two", "\u0646\u0627\u0645": 2}','2026-01-02 00:00:00.000000','ready',2.0,2,'0123456789abcdef',NULL,NULL,1,NULL,NULL,NULL);
INSERT INTO "recordings" VALUES(3,'three','default','8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',5,'audio/wav','fa','{"name": "three", "\u0646\u0627\u0645": 3}','2026-01-03 00:00:00.000000','ready',2.0,2,'0123456789abcdef',NULL,NULL,1,NULL,NULL,NULL);
INSERT INTO "recordings" VALUES(4,'waiting','default','80cfa3e7f28dde4df64436b652230aff28d7779116d1369c21ef2bbf37261d71',7,'audio/wav','fa','{"name": "waiting", "\u0646\u0627\u0645": 4}','2026-01-04 00:00:00.000000','pending',NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "recordings" VALUES(5,'failed','default','5d28a90f4498a81461efbaf6f628a19d9778390bb5c81a393dd936181cc3d826',6,'audio/wav','fa','{"name": "failed", "\u0646\u0627\u0645": 5}','2026-01-05 00:00:00.000000','failed',NULL,NULL,NULL,'silent_audio','Nothing can be heard.',1,NULL,NULL,NULL);
CREATE TABLE reindexing (
	recording INTEGER NOT NULL, 
	model TEXT NOT NULL, 
	status TEXT NOT NULL, 
	duration_s FLOAT, 
	segments INTEGER, 
	error_code TEXT, 
	error_detail TEXT, 
	attempts INTEGER NOT NULL, 
	lease_owner TEXT, 
	lease_until FLOAT, 
	PRIMARY KEY (recording, model), 
	FOREIGN KEY(recording) REFERENCES recordings ("key") ON DELETE CASCADE
);
CREATE TABLE segments (
	recording INTEGER NOT NULL, 
	model TEXT NOT NULL, 
	ordinal INTEGER NOT NULL, 
	start_s FLOAT NOT NULL, 
	end_s FLOAT NOT NULL, 
	vector BLOB NOT NULL, transcript TEXT, 
	CONSTRAINT segments_by_model PRIMARY KEY (recording, model, ordinal), 
	FOREIGN KEY(recording) REFERENCES recordings ("key") ON DELETE CASCADE
);
INSERT INTO "segments" VALUES(1,'0123456789abcdef',0,0.0,1.0,X'D25E113EADCEAC3EAEFF0A3E2D0B09BF656BBE3E9BC43B3EB9DE61BEB172743E995B193E5174F73D294B3F3CB8F9653E28E59ABE780E89BDD7CD4ABEC6E77B3E',NULL);
INSERT INTO "segments" VALUES(1,'0123456789abcdef',1,1.0,2.0,X'47D70F3C3D6184BDE8F630BEBBD568BDDCDFEB3A818079BD4F70923E7DD8633E6F6619BFAAC3D5BE67381EBD7C1ABFBDF368413D90BD443D9DA8EF3E3FAD7BBE',NULL);
INSERT INTO "segments" VALUES(2,'0123456789abcdef',0,0.0,1.0,X'CD574E3D8FA30EBE7A6BE1BDF88B26BF8089F53EB9199C3E8A97B1BDBB24533ED576993D331E17BE055F853EA17AA9BDB072B3BDD92558BE6548F83D458AD8BC',NULL);
INSERT INTO "segments" VALUES(2,'0123456789abcdef',1,1.0,2.0,X'884F073E8BAB16BE08C6FB3CD0695DBE29CE503ECEA33A3D200FA43D9FBACB3D7DD07ABEAA57423E252EFF3E2049CBBE8992D6BE4CB5BABEC7CD503E6B85FF3C',NULL);
INSERT INTO "segments" VALUES(3,'0123456789abcdef',0,0.0,1.0,X'95ECC03E0495F1BE9B169E3D40AED6BDFA26ABBD350A23BD05F2BEBE99642FBDE89223BEF10E1D3FD1BE2A3D835585BD6AB754BDB698FCBD927B47BE43C493BD',NULL);
INSERT INTO "segments" VALUES(3,'0123456789abcdef',1,1.0,2.0,X'A6051A3ED27998BDCE0A993E106A7FBD5518F83B8602F73E00352E3E8A7621BECDBA69BD43BE2C3E179B1A3F2D55ACBDC9AC9BBD6729A03E34A68DBE5175BABD',NULL);
CREATE TABLE turns (
	name TEXT NOT NULL, 
	owner TEXT NOT NULL, 
	until FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE UNIQUE INDEX one_active_model ON models (state) WHERE state = 'active';
CREATE INDEX reindexing_by_status ON reindexing (model, status, recording);
CREATE INDEX changes_by_recording ON changes (recording, seq);
CREATE INDEX ix_recordings_sha256 ON recordings (sha256);
CREATE INDEX recordings_by_status ON recordings (status, "key");
CREATE INDEX recordings_by_arrival ON recordings (created_at, id, collection);
CREATE INDEX recordings_by_collection ON recordings (collection, created_at, id);
CREATE INDEX recordings_by_readiness ON recordings (collection, status, "key");
CREATE INDEX recordings_by_uploader ON recordings (uploaded_by, size_bytes, duration_s) WHERE uploaded_by IS NOT NULL;
CREATE INDEX recordings_by_size ON recordings (size_bytes);
CREATE INDEX once_by_end ON once (kept_until);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('recordings',9);
INSERT INTO "sqlite_sequence" VALUES('changes',4);
COMMIT;
