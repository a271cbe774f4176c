#!/bin/sh
# Prepare this host for `docker compose up`: check the versions of Docker, write .env, and make the secrets.
#
# ops/secrets/ gets one file per secret. Files that exist stay. A password that an older .env holds is taken over, so
# that the data of this host stays readable. Only the owner of the folder can enter it. The files in it are readable
# for all, because the users of the containers read them.
set -eu
cd "$(dirname "$0")/.."
folder=ops/secrets

# End unless version $2 of the program $1 is $3 or newer.
need() {
    oldest=$(printf '%s\n%s\n' "${2#v}" "$3" | sort -V | head -n 1)
    test "$oldest" = "$3" || { echo "$1 $2 is too old: $3 or newer is needed" >&2; exit 1; }
}

compose=$(docker compose version --short 2>/dev/null) || { echo "Docker Compose is not installed" >&2; exit 1; }
need "Docker Compose" "$compose" 2.24
# An older engine refuses `start_interval` of the health checks.
engine=$(docker version --format '{{.Server.Version}}' 2>/dev/null) || { echo "No Docker engine answers" >&2; exit 1; }
need "Docker Engine" "$engine" 25.0

test -e .env || cp .env.example .env
mkdir -p "$folder"
chmod 700 "$folder"

random() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

# The value of a variable in .env, or a random one.
secret() {
    value=$(sed -n "s/^$1=//p" .env | tail -n 1)
    echo "${value:-$(random)}"
}

# Write standard input into a file of the folder, unless the file exists.
keep() {
    if [ -e "$folder/$1" ]; then cat >/dev/null; else (umask 022 && cat >"$folder/$1" && chmod 444 "$folder/$1"); fi
}

secret POSTGRES_PASSWORD | keep postgres_password
secret QUEUE_PASSWORD | sed 's/^/requirepass /' | keep queue.conf
secret CACHE_PASSWORD | sed 's/^/requirepass /' | keep cache.conf
secret GRAFANA_PASSWORD | keep grafana_password
secret FLOWER_PASSWORD | sed 's/^/afterimage:/' | keep flower_auth
secret SIGNING_KEY | sed 's/.*/["&"]/' | keep afterimage_security__signing_keys
printf '' | keep alert_smtp_password

# The addresses contain the passwords above.
echo "postgresql+psycopg2://afterimage:$(cat $folder/postgres_password)@postgres:5432/afterimage" | keep afterimage_database__url
echo "redis://:$(cut -d' ' -f2 $folder/queue.conf)@queue:6379/0" | keep afterimage_queue__url
echo "redis://:$(cut -d' ' -f2 $folder/cache.conf)@cache:6379/0" | keep afterimage_cache__url
echo "Secrets are in $folder. Check .env, then run: docker compose up --build -d --wait"
