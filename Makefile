# Two commands matter: make demo, make test. Each installs what it needs and says so.
.PHONY: demo demo-serve test test-long test-report docs bench bench-growth lint build verifiers clean deps-build

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
	$(GO) test -timeout 40m ./...

test-long: ## the same under the race detector, longer fault injection, and each fuzz target for 30 s
	@packaging/dev/deps.sh test
	@$(MAKE) --no-print-directory build
	YINJIAN_LONG=1 $(GO) test -race -timeout 90m ./...
	packaging/dev/fuzz.sh 30s

test-report: ## make test, and its result as a page: build/docs/test-report.html
	@packaging/dev/deps.sh test
	@$(MAKE) --no-print-directory build lint
	@mkdir -p build/docs
	$(GO) test -json -timeout 40m ./... > build/docs/test.json; failed=$$?; \
		$(GO) run ./packaging/docs report < build/docs/test.json > build/docs/test-report.html || exit 1; exit $$failed

docs: build/yinjian ## what is generated of the documentation, anew; tests hold it against the code. The parts list goes to build/docs
	@mkdir -p build/docs
	build/yinjian db dictionary --out docs/data-dictionary.md
	build/yinjian reference > build/docs/cli.md && cp build/docs/cli.md docs/cli.md
	for page in api licences sbom; do $(GO) run ./packaging/docs $$page > build/docs/$$page || exit 1; done
	cp build/docs/api docs/api.md && cp build/docs/licences docs/third-party.md && mv build/docs/sbom build/docs/sbom.cdx.json

# TSA_PEER='--peer "command …" --peer-url http://127.0.0.1:3000/…' gives the timestamp service another one to be held against.
bench: ## ratios measured in one run, and where the time goes: bench/results, bench/PROFILE.md
	@packaging/dev/deps.sh demo
	@$(MAKE) --no-print-directory build
	YINJIAN_REVISION=$$(git describe --always --dirty) build/yinjian bench --dir out/bench --results bench/results --profile 5s
	build/yinjian bench-pool --dir out/bench-pool --results bench/results
	@packaging/dev/deps.sh test
	YINJIAN_REVISION=$$(git describe --always --dirty) build/yinjian bench-database --dir out/bench-database --results bench/results
	YINJIAN_REVISION=$$(git describe --always --dirty) build/yinjian bench-tsa --dir out/bench-tsa --results bench/results --profile 5s $(TSA_PEER)
	build/yinjian bench-growth --dir out/bench-growth --entries 10000,300000

bench-growth: ## what a journal of 10,000,000 entries costs against one of 10,000: bench/results; 20 GB, half an hour
	@packaging/dev/deps.sh demo
	@$(MAKE) --no-print-directory build
	YINJIAN_REVISION=$$(git describe --always --dirty) build/yinjian bench-growth --dir out/bench-growth --results bench/results --entries 10000,100000,1000000,10000000
	YINJIAN_REVISION=$$(git describe --always --dirty) YINJIAN_GROWTH=10000000 YINJIAN_GROWTH_RESULTS=$(CURDIR)/bench/results/growth-database.md $(GO) test ./dbdriver/central -run TestGrowth -timeout 4h

lint:
	@packaging/dev/lint.sh

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
