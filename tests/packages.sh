#!/usr/bin/env bash
# Installs the programs that the end-to-end tests send through the tunnel, and those that a test cluster is made of,
# where they are missing.
set -euo pipefail
need=()
for pair in postgresql-15:/usr/lib/postgresql/15/bin/postgres postgresql-client-15:/usr/lib/postgresql/15/bin/psql \
    redis-server:/usr/bin/redis-server redis-tools:/usr/bin/redis-cli nginx-light:/usr/sbin/nginx wrk:/usr/bin/wrk nghttp2-client:/usr/bin/h2load \
    haproxy:/usr/sbin/haproxy python3-venv:/usr/share/doc/python3-venv \
    openssh-server:/usr/sbin/sshd openssh-client:/usr/bin/ssh curl:/usr/bin/curl \
    valgrind:/usr/bin/valgrind etcd-server:/usr/bin/etcd containerd:/usr/bin/containerd runc:/usr/sbin/runc \
    containernetworking-plugins:/usr/lib/cni/ptp nftables:/usr/sbin/nft conntrack:/usr/sbin/conntrack \
    buildah:/usr/bin/buildah busybox-static:/bin/busybox prometheus:/usr/bin/prometheus; do
    [ -x "${pair#*:}" ] || need+=("${pair%%:*}")
done
[ ${#need[@]} -eq 0 ] && exit 0
[ "$(id -u)" = 0 ] || { echo "missing packages: ${need[*]} (install them, or run as root)" >&2; exit 1; }
# The tests start their own servers; none of the packages' services may.
policy=/usr/sbin/policy-rc.d
made=0
if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod +x "$policy"; made=1; fi
trap '[ "$made" = 1 ] && rm -f "$policy"' EXIT
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${need[@]}"
