#!/bin/sh
# Build stand-ins for the images of others from Debian packages, where no registry of images can be reached.
#
# They start docker-compose.yml on a real engine: same commands, users, folders and ports. They are not the images that
# production uses, and Debian's versions differ. Debian has no Grafana, so it has no stand-in.
#
#   ops/stand_ins/build.sh FOLDER [MIRROR]        FOLDER: about 1 GB, removed by hand; needs root and debootstrap
set -eu
folder=$1
mirror=${2:-http://deb.debian.org/debian}
here=$(dirname "$0")
build="docker build --network host --file $here/Dockerfile"

for release in stable:bookworm unstable:sid; do
    name=${release%:*}
    tree=$folder/$name
    # A tree gets its name when it is complete, so that an interrupted download begins again.
    test -d "$tree" || { rm -rf "$tree.part" && debootstrap --variant=minbase "${release#*:}" "$tree.part" "$mirror" >/dev/null && mv "$tree.part" "$tree"; }
    tar --directory "$tree" --exclude ./var/cache/apt --create . | docker import --change 'CMD ["sh"]' - "stand-in-debian-$name"
done
for image in python postgres redis prometheus alertmanager caddy; do
    $build --target "$image" --tag "stand-in-$image" "$here"
done
cat <<'TEXT'
# Lines for .env:
BASE_IMAGE=stand-in-python
POSTGRES_IMAGE=stand-in-postgres
REDIS_IMAGE=stand-in-redis
PROMETHEUS_IMAGE=stand-in-prometheus
ALERTMANAGER_IMAGE=stand-in-alertmanager
PROXY_IMAGE=stand-in-caddy
TEXT
