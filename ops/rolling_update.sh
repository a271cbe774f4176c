#!/bin/sh
# Replace every container by one of the current images and settings, without an interruption of the API.
#
# New API processes start beside the old ones. When they are healthy, the old ones stop. The proxy repeats a request
# that a stopping process refuses. Other containers are replaced as `docker compose up` does: their work waits meanwhile.
#
#   ops/rolling_update.sh            after `docker compose build`, or after the images in .env were changed
set -eu
cd "$(dirname "$0")/.."

old=$(docker compose ps --quiet api)
count=$(echo "$old" | wc -w)
test "$count" -gt 0 || { echo "No API runs: use docker compose up -d --wait" >&2; exit 1; }

docker compose run --rm --no-deps migrate
docker compose up -d --no-deps --no-recreate --wait --scale "api=$((2 * count))" api
# shellcheck disable=SC2086  # one argument per container
docker stop $old >/dev/null
# shellcheck disable=SC2086
docker rm $old >/dev/null
# Without --scale, compose would stop all containers of a service but one.
scales=$(docker compose ps --format '{{.Service}}' | sort | uniq -c | awk '{print "--scale", $2 "=" $1}')
# shellcheck disable=SC2086
docker compose up -d --wait $scales "$@"
