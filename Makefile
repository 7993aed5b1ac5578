# Two commands matter: make demo, make test. Each installs what it needs and says so.
.PHONY: image image-test image-test-changed image-test-long packages packages-test cross demo demo-serve test test-long test-report docs source-bundle bench bench-growth load load-test load-tools soak lint vuln build verifiers clean deps-build

OUT      ?= out/demo
GO       ?= go
GOFLAGS  += -buildvcs=false
export GOFLAGS

demo: ## a record signed, stamped, stored, verified and tamper-checked, in front of you
	@packaging/dev/deps.sh demo
	@$(MAKE) --no-print-directory build/yinjian build/libyinjian-p11.so build/yinjian-verify
	build/yinjian demo --dir $(OUT)

demo-serve: ## the same set-up, running until Ctrl-C, with its console; addresses in out/demo/endpoints.json
	@packaging/dev/deps.sh demo
	@$(MAKE) --no-print-directory build/yinjian build/libyinjian-p11.so
	@echo "演示管理员：登录名、口令 the demo's administrators, id and password:"; cat $(OUT)/credentials/administrators.txt
	build/yinjian serve --dir $(OUT)

test: ## every test that fits in minutes, with the real peers (OpenSSL, Bouncy Castle, SoftHSM2, openCryptoki, PostgreSQL, chrony, gpsd)
	@packaging/dev/deps.sh test
	@$(MAKE) --no-print-directory build lint
	$(GO) test -timeout 90m ./...

test-long: ## the same under the race detector, longer fault injection, and each fuzz target for a minute
	@packaging/dev/deps.sh test
	@$(MAKE) --no-print-directory build
	YINJIAN_LONG=1 $(GO) test -race -timeout 90m ./...
	packaging/dev/fuzz.sh 60s

test-report: ## make test, and its result as a page: build/docs/test-report.html
	@packaging/dev/deps.sh test
	@$(MAKE) --no-print-directory build lint
	@mkdir -p build/docs
	$(GO) test -json -timeout 90m ./... > build/docs/test.json; failed=$$?; \
		$(GO) run ./packaging/docs report < build/docs/test.json > build/docs/test-report.html || exit 1; exit $$failed

docs: build/yinjian ## what is generated of the documentation, anew; tests hold it against the code. The parts list goes to build/docs
	@mkdir -p build/docs
	build/yinjian db dictionary --out docs/data-dictionary.md
	build/yinjian reference > build/docs/cli.md && cp build/docs/cli.md docs/cli.md
	for page in api configuration licences sbom; do $(GO) run ./packaging/docs $$page > build/docs/$$page || exit 1; done
	cp build/docs/api docs/api.md && cp build/docs/configuration docs/configuration.md && cp build/docs/licences docs/third-party.md && mv build/docs/sbom build/docs/sbom.cdx.json

source-bundle: ## the sources as they are handed over, with their modules, for a machine without network: build/yinjian-source-….tar.gz
	packaging/dev/source-bundle.sh build

# All measurements of one checkout name one revision, though each leaves results in it.
bench bench-growth load load-test load-tools soak: export YINJIAN_REVISION = $(shell packaging/dev/revision.sh)

# What is computed from all results, after any of them is new.
define summed-up
	-build/yinjian bench-capacity --results bench/results --page docs/capacity.md
	build/yinjian bench-targets --results bench/results
	build/yinjian bench-buyer --results bench/results --readme README.md,README.zh-CN.md
endef

# TSA_PEER='--peer "command …" --peer-url http://127.0.0.1:3000/…' gives the timestamp service another one to be held against than
# sigstore's timestamp-server, which is used where it lies in build. PARTS='sign tsa' measures those alone: bench/run.sh.
bench: ## ratios measured in one run, and where the time goes: bench/results, bench/PROFILE.md; parts.md says how long each part took
	@packaging/dev/deps.sh bench
	@$(MAKE) --no-print-directory build
	bench/run.sh

bench-growth: ## what a journal of 10,000,000 entries costs against one of 10,000: bench/results; 20 GB, half an hour
	@packaging/dev/deps.sh bench
	@$(MAKE) --no-print-directory build
	build/yinjian bench-growth --dir out/bench-growth --results bench/results --entries 10000,100000,1000000,10000000
	YINJIAN_GROWTH=10000000 YINJIAN_GROWTH_RESULTS=$(CURDIR)/bench/results/growth-database.md $(GO) test ./dbdriver/central -run TestGrowth -timeout 4h

# USERS, LOAD (the long run of the mix at the end) and LOADFLAGS (bench-load --help) may be given.
USERS ?= 500
LOAD  ?= 10m
load: ## 500 users at once: sign alone and the mix, the loader beside the appliance and on the other processor: bench/results/load.*
	@packaging/dev/deps.sh demo
	@$(MAKE) --no-print-directory build
	build/yinjian bench-load --dir out/load --results bench/results --users $(USERS) --long $(LOAD) $(LOADFLAGS)
	$(summed-up)

load-test: ## our loader, k6 and JMeter with the same mix, few users, ten seconds each: bench/load
	@packaging/dev/deps.sh load
	@$(MAKE) --no-print-directory build
	build/yinjian bench-loaders --dir out/load-test

# LOAD_USERS, LOAD_FOR (of each loader) may be given.
LOAD_USERS ?= 500
LOAD_FOR   ?= 1m
load-tools: ## the same three with 500 users, a minute each: bench/results/loaders.*
	@packaging/dev/deps.sh load
	@$(MAKE) --no-print-directory build
	build/yinjian bench-loaders --dir out/load-tools --results bench/results --users $(LOAD_USERS) --for $(LOAD_FOR) --warm-up 10s

# SOAK (hours: 8h), USERS of the soak by SOAKFLAGS, as the seed (bench-soak --help). Needs root for a volume that can be full.
SOAK ?= 10m
soak: ## a long run with faults injected, and its ledger: bench/results/soak.*; ends with 1 when anything severe was found
	@packaging/dev/deps.sh bench
	@$(MAKE) --no-print-directory build
	build/yinjian bench-soak --dir out/soak --results bench/results --for $(SOAK) $(SOAKFLAGS); failed=$$?; \
		build/yinjian bench-capacity --results bench/results --page docs/capacity.md; \
		build/yinjian bench-targets --results bench/results && build/yinjian bench-buyer --results bench/results --readme README.md,README.zh-CN.md && exit $$failed

lint:
	@packaging/dev/lint.sh

# Not part of test: its database is at vuln.go.dev, and what it says changes with the day.
vuln: ## known vulnerabilities of what is built in (govulncheck); needs the internet
	$(GO) run golang.org/x/vuln/cmd/govulncheck@v1.9.0 $(VULNFLAGS) ./...

build: deps-build build/yinjian build/libyinjian-p11.so build/yinjian-verify

.PHONY: dm
DM_DRIVER ?=
dm: deps-build ## build/yinjian-dm, with DM's driver from the module proxy, or from the folder DM_DRIVER; see docs/database.md
	@mkdir -p build
	GO=$(GO) dbdriver/dm/build/build.sh build/yinjian-dm $(DM_DRIVER)

verifiers: ## the offline verifier for every platform it is handed out for
	@mkdir -p build
	for p in linux/amd64 linux/arm64 linux/loong64 windows/amd64; do \
		CGO_ENABLED=0 GOOS=$${p%/*} GOARCH=$${p#*/} $(GO) build -trimpath -o build/yinjian-verify-$${p%/*}-$${p#*/} ./appliance/cmd/yinjian-verify || exit 1; done

VARIANT ?= evaluation
INDEX   ?= 1
ARCH    ?= amd64
# The steps, files and base of an architecture other than amd64 have its name behind theirs.
DASHARCH = $(if $(filter-out amd64,$(ARCH)),-$(ARCH))
image: ## the sealed image, its installation medium and its update bundle, build/image; ARCH=arm64: build/image-arm64; VARIANT=release without the software cipher machine; INDEX, FLOOR, MIN_INDEX, NOTES: docs/update.md
	@packaging/dev/deps.sh image$(DASHARCH)
	$(GO) run ./iso/mkimage build --base iso/bases/debian12$(DASHARCH).toml --out build/image$(DASHARCH) --keys build/image$(DASHARCH)-keys --variant $(VARIANT) --index $(INDEX) $(if $(FLOOR),--floor $(FLOOR)) $(if $(MIN_INDEX),--min-index $(MIN_INDEX)) $(if $(NOTES),--notes '$(NOTES)')

image-test: image ## what needs the image: two builds compared, virtual machines (iso/vmtest)
	YINJIAN_IMAGE=$(CURDIR)/build/image $(GO) test -count=1 -timeout 40m -v ./iso/build ./iso/init ./iso/install ./iso/layout
	YINJIAN_IMAGE=$(CURDIR)/build/image $(GO) test -count=1 -timeout 90m -parallel 8 -v ./iso/vmtest # -v: the times are shown; two machines at a time

image-test-changed: ## the same, where anything that it depends on is not as when it passed last (iso/vmtest/passed)
	packaging/dev/when-changed.sh image

image-test-long: image ## the same with what takes an hour and more: recovery key, passphrase, power cuts, dialogue, other disks (YINJIAN_SEED, YINJIAN_CUTS, YINJIAN_SOAK), and the image for arm64
	@$(MAKE) --no-print-directory image ARCH=arm64
	YINJIAN_IMAGE=$(CURDIR)/build/image-arm64 $(GO) test -count=1 -timeout 90m -run 'TestReproducible|TestRootImage|TestKernelsNameTheRoot' ./iso/build
	YINJIAN_LONG=1 YINJIAN_IMAGE=$(CURDIR)/build/image YINJIAN_IMAGE_ARM64=$(CURDIR)/build/image-arm64 $(GO) test -count=1 -timeout 300m -v ./iso/vmtest

packages: ## deb, rpm and tar for servers that are already there, amd64 and arm64, with signed lists: build/packages (THROW_AWAY=1: signed for trials)
	@packaging/dev/deps.sh packages
	$(GO) run ./packaging/packages $(if $(THROW_AWAY),--throw-away)

packages-test: ## the packages on a Debian that runs in a container: installed, upgraded, removed, installed again; as root
	@packaging/dev/deps.sh packages
	YINJIAN_PACKAGES=1 $(GO) test -count=1 -timeout 30m -v -run TestServers ./packaging/packages

cross: ## programs for arm64 and loong64: build/cross; those for arm64 tried under qemu
	@packaging/dev/deps.sh packages
	$(GO) run ./packaging/packages cross
	YINJIAN_CROSS=$(CURDIR)/build/cross $(GO) test -count=1 -timeout 30m -v -run TestCross ./packaging/packages

deps-build:
	@packaging/dev/deps.sh build

# The Go tool decides what is stale; make does not guess.
.PHONY: build/yinjian build/libyinjian-p11.so build/yinjian-verify
build/yinjian:
	@mkdir -p build
	$(GO) build -trimpath -o $@ ./appliance/cmd/yinjian

build/yinjian-verify:
	@mkdir -p build
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./appliance/cmd/yinjian-verify

build/libyinjian-p11.so:
	@mkdir -p build
	hsm/softtoken/module/build.sh $@

clean:
	rm -rf build out
