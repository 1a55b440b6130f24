#!/usr/bin/env bash
# Builds the images from programs that `cargo auditable` built: build.sh PROGRAMS OUT (needs buildah and auditable2cdx).
# Each image becomes an archive that `docker load` and `ctr images import` take; beside it, what its programs are made of (CycloneDX).
set -euo pipefail
programs=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -1)
revision=$(git rev-parse HEAD)

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
buildah() {
    command buildah --storage-driver vfs --root "$out/storage/root" --runroot "$out/storage/run" "$@"
}

for dockerfile in images/*.Dockerfile; do
    name=$(basename "$dockerfile" .Dockerfile)
    for program in $(awk '$1 == "COPY" { print $2 }' "$dockerfile"); do
        cp "$programs/$program" "$context/"
        auditable2cdx "$programs/$program" >"$out/$program.cdx.json"
    done
    image=ambit/$name:$version
    buildah bud --quiet --isolation chroot --file "$dockerfile" --tag "$image" \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" "$context" >/dev/null
    # Buildah doesn't replace an archive.
    rm -f "$out/$name.tar"
    buildah push --quiet "$image" "docker-archive:$out/$name.tar:$image"
    echo "$image: $out/$name.tar"
done
command rm -rf "$out/storage"
