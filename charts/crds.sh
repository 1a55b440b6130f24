#!/usr/bin/env bash
# Writes the CRDs that the chart installs from the Go modules in which they are published (needs go).
set -euo pipefail
GATEWAY_API=sigs.k8s.io/gateway-api@v1.7.0
ISTIO_API=istio.io/api@v1.32.0
# The kinds of Istio that the control plane reads (control/src/kind.rs).
ISTIO_KINDS=(
    authorizationpolicies.security.istio.io
    destinationrules.networking.istio.io
    peerauthentications.security.istio.io
    requestauthentications.security.istio.io
    serviceentries.networking.istio.io
    telemetries.telemetry.istio.io
    virtualservices.networking.istio.io
    workloadentries.networking.istio.io
)

cd "$(dirname "$0")/ambit/files/crds"
export GOTOOLCHAIN=go1.27.1

# Directory of a module, at a version.
module() {
    (cd / && go mod download -json "$1") | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'
}

rm -rf gateway-api istio
mkdir gateway-api istio

for file in "$(module "$GATEWAY_API")"/config/crd/standard/*.yaml; do
    grep -q '^kind: CustomResourceDefinition$' "$file" || continue
    name=$(basename "$file" .yaml)
    { echo "# From $GATEWAY_API, Apache-2.0; written by charts/crds.sh."; cat "$file"; } \
        >"gateway-api/${name#gateway.networking.k8s.io_}.gateway.networking.k8s.io.yaml"
done

all="$(module "$ISTIO_API")/kubernetes/customresourcedefinitions.gen.yaml"
for kind in "${ISTIO_KINDS[@]}"; do
    { echo "# From $ISTIO_API, Apache-2.0; written by charts/crds.sh."
      awk -v name="  name: $kind" 'BEGIN { RS = "---\n" } index($0 "\n", name "\n") { printf "%s", $0 }' "$all"
    } >"istio/$kind.yaml"
    grep -q "^  name: $kind\$" "istio/$kind.yaml" || { echo "no $kind in $ISTIO_API" >&2; exit 1; }
done
chmod -R u+w .
