#!/bin/sh
# Pull the images of others, and write their digests into .env. Later starts and builds then use the same bytes.
#
#   ops/pin_images.sh            run it again to update: each tag may then name a newer image
#
# A variable in .env keeps the image that it names. Without one, the image is that of docker-compose.yml.
set -eu
cd "$(dirname "$0")/.."
test -e .env || { echo "Run ops/prepare.sh first" >&2; exit 1; }

sed -n 's/.*${\([A-Z]*_IMAGE\):-\([^}]*\)}.*/\1 \2/p' docker-compose.yml | grep -v afterimage- | sort -u |
    while read -r variable default; do
        image=$(sed -n "s/^$variable=//p" .env | tail -n 1)
        image=${image:-$default}
        image=${image%@*}
        docker pull --quiet "$image" >/dev/null
        digest=$(docker image inspect --format '{{index .RepoDigests 0}}' "$image")
        lines=$(grep -v "^$variable=" .env || true)
        printf '%s\n%s=%s@%s\n' "$lines" "$variable" "$image" "${digest#*@}" >.env
        echo "$variable=$image@${digest#*@}"
    done
echo "Now run: docker compose build, then ops/rolling_update.sh"
