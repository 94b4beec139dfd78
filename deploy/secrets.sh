#!/bin/sh
# Makes the secrets of docker-compose.yml's profiles `scaled` and `monitoring`, at random, in deploy/secrets; what is
# there already is left alone. With the argument `scaled`, `.env` says that `docker compose up` means that profile.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets secrets/tls
chmod 755 secrets/tls # for certificates, which the proxy reads without any rights; the folder above is closed
secret() { od -An -tx1 -N24 /dev/urandom | tr -d ' \n'; }
keep() { # the file's content comes in; a file that is there stays
    if [ -e "secrets/$1" ]; then cat >/dev/null; else cat >"secrets/$1.part" && mv "secrets/$1.part" "secrets/$1"; fi
}

if [ ! -e secrets/clasp.env ]; then # its parts belong together, so all are made at once
    rm -f secrets/postgres.env secrets/milvus.env secrets/s3.env secrets/metrics_key
    postgres=$(secret) milvus=$(secret) s3=$(secret) metrics=$(secret)
    keep postgres.env <<END
POSTGRES_PASSWORD=$postgres
END
    keep milvus.env <<END
COMMON_SECURITY_DEFAULTROOTPASSWORD=$milvus
END
    keep s3.env <<END
AWS_ACCESS_KEY_ID=clasp
AWS_SECRET_ACCESS_KEY=$s3
END
    printf %s "$metrics" | keep metrics_key
    chmod 444 secrets/metrics_key # Prometheus is not the user who runs this; the folder is closed to others
    keep clasp.env <<END
CLASP_DATABASE_URL=postgresql://clasp:$postgres@postgres:5432/clasp
CLASP_VECTOR_STORE_TOKEN=root:$milvus
AWS_ACCESS_KEY_ID=clasp
AWS_SECRET_ACCESS_KEY=$s3
CLASP_API_KEYS=$metrics
END
fi
keep grafana.env <<END
GF_SECURITY_ADMIN_PASSWORD=$(secret)
END

if [ "${1:-}" = scaled ] && ! grep -qs '^COMPOSE_PROFILES=' ../.env; then
    printf 'COMPOSE_PROFILES=scaled\nSINGLE_REPLICAS=0\n' >>../.env
fi
