package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"yinjian/appliance/account"
	"yinjian/ntp/sysclock"
)

const benchLoadersText = `三种施压工具(yinjian bench-loader、k6、JMeter)依次以同一混合负载，对同一台评估设备施压；设备、密码机与工具共用本机处理器。
各工具的处理器时间相差很大，速率因此不能互相比较：要看的是错误(须为零)与设备每次请求的处理器时间。k6 的用户在应答后停顿(合计约每秒 20 次请求)，
因为其脚本自己算 SM3；另两种不停顿。没有装的工具写明，不算失败。

The three loaders, one after the other, with the same mix against one evaluation appliance; appliance, cipher machine and loader share
the processors. The loaders differ much in what they cost, so their rates are not to be compared: what counts is that nothing failed,
and what the appliance took for a request. k6's users pause after an answer, so that all of them ask some 20 times a second, for its
script hashes what it sends; those of the others do not pause. A loader that is not installed is named, and no failure.

  requests   answered after the warm-up (JMeter: that began after its users had); a class that was not asked for at all is a failure
  errors     of all answers, those of k6 and JMeter during the warm-up too; = 0
  CPU        of the whole run of that loader, its start included, over all of its answers
  memory     of the loader's process, the most that it had`

// A loadersBench runs each loader once.
type loadersBench struct {
	*loadBench
	tools, built string
	runs         []*loaderRun
}

// A loaderRun is what one loader saw, and what it cost.
type loaderRun struct {
	Name     string                  `json:"name"`
	Missing  string                  `json:"missing,omitempty"` // why it was not run
	Version  string                  `json:"version"`
	Seconds  float64                 `json:"seconds"` // measured
	Took     float64                 `json:"took_s"`  // all of it
	Classes  map[string]*loaderClass `json:"classes"`
	Answers  int64                   `json:"answers"` // with those of the warm-up
	Errors   map[string]int64        `json:"errors"`
	OwnCPU   float64                 `json:"loader_cpu_s"`
	OtherCPU float64                 `json:"appliance_cpu_s"` // with its workers and the cipher machine
	Memory   int64                   `json:"loader_rss_bytes"`
}

// A loaderClass is one class of requests, in milliseconds.
type loaderClass struct {
	Requests int64   `json:"requests"`
	P50      float64 `json:"p50_ms"`
	P95      float64 `json:"p95_ms"`
	P99      float64 `json:"p99_ms"`
	Most     float64 `json:"most_ms"`
}

func benchLoadersCommand() *cobra.Command {
	b := &loadersBench{loadBench: &loadBench{bench: &bench{}}}
	c := &cobra.Command{
		Use: "bench-loaders --dir DIR", Hidden: true, Short: "三种施压工具各跑一次 (each of the three loaders once)", Long: benchLoadersText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if b.each < time.Second || b.warm < time.Second || b.signers < 1 {
				return usageError{errors.New("--for、--warm-up 至少 1s，--signers 须为正 (at least 1s; must be positive)")}
			}
			if err := b.check(); err != nil {
				return err
			}
			if b.folder, err = filepath.Abs(b.folder); err != nil {
				return err
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.IntVar(&b.users, "users", 5, "用户数，各用一个连接 (users, a connection each)")
	f.DurationVar(&b.each, "for", 10*time.Second, "每种工具测量多久 (how long each loader is measured)")
	f.DurationVar(&b.warm, "warm-up", 2*time.Second, "预热，另计 (warm-up, told apart)")
	f.IntVar(&b.batch, "batch", 10, "每批份数，1–500 (documents of a batch)")
	f.IntVar(&b.bytes, "bytes", 2048, "每份字节数 (bytes of a document)")
	f.IntVar(&b.signers, "signers", 64, "签名人数 (signers)")
	f.StringVar(&b.folder, "dir", "out/load-test", "目录，每次重建 (folder, made anew)")
	f.StringVar(&b.results, "results", "", "结果目录：loaders.md、loaders.json (folder for the results)")
	f.StringVar(&b.tools, "tools", "bench/load", "k6 与 JMeter 的计划所在 (folder of the plans)")
	f.StringVar(&b.built, "build", "build", "k6 与编译出的 JMeter 请求所在 (folder of k6, and of JMeter's compiled requests)")
	return c
}

func (b *loadersBench) run(ctx context.Context) (err error) {
	setMemory()
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(b.folder, 0o700); err != nil {
		return err
	}
	b.demo = &demo{dir: filepath.Join(b.folder, "appliance"), clock: clock, begun: clock.Monotonic()}
	b.mix, b.stamp = usualMix, account.StampNone
	if err := b.fresh(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stopServer()) }()
	if err := b.startServer(ctx); err != nil {
		return err
	}
	target := filepath.Join(b.folder, "target.json")
	if err := b.writeTarget(ctx, target, b.signers, b.stamp); err != nil {
		return explain(err)
	}
	fmt.Println(benchLoadersText)
	fmt.Println()
	for _, one := range []struct {
		name string
		run  func(ctx context.Context, target string, r *loaderRun) error
	}{{"yinjian bench-loader", b.ours}, {"k6", b.k6}, {"JMeter", b.jmeter}} {
		fmt.Printf("==> %s\n", one.name)
		r := &loaderRun{Name: one.name, Classes: map[string]*loaderClass{}, Errors: map[string]int64{}}
		b.runs = append(b.runs, r)
		begun := time.Now() // interval
		if err := one.run(ctx, target, r); err != nil {
			return fmt.Errorf("%s: %w", one.name, err)
		}
		r.Took = time.Since(begun).Seconds()
		if r.Missing != "" {
			fmt.Printf("    跳过 skipped: %s\n", r.Missing)
			continue
		}
		for _, name := range loadNames { // a loader that asks for less than the mix proves less than it seems to
			if c := r.Classes[name]; c == nil || c.Requests == 0 {
				r.Errors["not asked for: "+name]++
			}
		}
	}
	return b.reportLoaders()
}

// child runs one loader, and notes what it and the appliance took.
func (b *loadersBench) child(ctx context.Context, r *loaderRun, out io.Writer, log string, env []string, argv ...string) error {
	said, err := os.Create(filepath.Join(b.folder, log))
	if err != nil {
		return err
	}
	defer said.Close()
	if out == nil {
		out = said
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), env...), out, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // ours ends with us: see startServer
	before, err := b.processors()
	if err != nil {
		return err
	}
	failed := cmd.Run()
	after, err := b.processors()
	if err != nil {
		return err
	}
	for role, used := range after.roles {
		if role != roleClient { // us, who only look on
			r.OtherCPU += used - before.roles[role]
		}
	}
	if cmd.ProcessState != nil {
		r.OwnCPU = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
		if used, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			r.Memory = used.Maxrss << 10
		}
	}
	if failed != nil {
		text, _ := os.ReadFile(said.Name()) // best effort
		return fmt.Errorf("%w\n%s", failed, lastLines(text, 15))
	}
	return nil
}

func (b *loadersBench) ours(ctx context.Context, target string, r *loaderRun) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var answer bytes.Buffer
	argv := append([]string{self, "bench-loader", target, "--warm-up", b.warm.String(), "--for", b.each.String()}, b.args(b.mix.String(), 1)...)
	if err := b.child(ctx, r, &answer, "go.log", nil, argv...); err != nil {
		return err
	}
	var seen loadResult
	if err := json.Unmarshal(answer.Bytes(), &seen); err != nil {
		return err
	}
	r.Version, r.Seconds, r.Answers = machineOf(b.dir, b.now()).Revision, seen.Seconds, seen.All.Requests+seen.WarmUp.Requests
	for name, c := range seen.Classes {
		r.Classes[name] = &loaderClass{c.Requests, c.P50, c.P95, c.P99, c.Most}
	}
	for _, t := range []loadTally{seen.All, seen.WarmUp} {
		for code, n := range t.Errors {
			r.Errors[code] += n
		}
	}
	return nil
}

// whole are whole seconds, which is what the others take.
func whole(d time.Duration) string { return strconv.Itoa(int(d.Round(time.Second) / time.Second)) }

// k6Rate is about how many requests a second all of k6's users make, each with a pause after its answer. Its script hashes what it sends,
// and as many scripts as there are users, none of which pauses, leave each other no time for a handshake before the appliance gives up on it.
const k6Rate = 20

func (b *loadersBench) k6(ctx context.Context, target string, r *loaderRun) error {
	k6 := filepath.Join(b.built, "k6")
	if _, err := os.Stat(k6); err != nil {
		if k6, err = exec.LookPath("k6"); err != nil {
			r.Missing = "k6: packaging/dev/deps.sh load"
			return nil
		}
	}
	version, err := exec.CommandContext(ctx, k6, "version").Output()
	if err != nil {
		return err
	}
	for _, word := range strings.Fields(string(version)) {
		if r.Version == "" && strings.HasPrefix(word, "v") {
			r.Version = word
		}
	}
	t, err := readTarget(target)
	if err != nil {
		return err
	}
	summary := filepath.Join(b.folder, "k6.json")
	if err := os.RemoveAll(summary); err != nil {
		return err
	}
	pause := time.Duration(b.users) * time.Second / k6Rate
	env := []string{
		"SSL_CERT_FILE=" + t.CA, "TARGET=" + target, "USERS=" + strconv.Itoa(b.users), "THINK=" + fmt.Sprint(pause.Seconds()), "WARM_UP=" + whole(max(b.warm, pause)), "SECONDS=" + whole(b.each),
		"BATCH=" + strconv.Itoa(b.batch), "BYTES=" + strconv.Itoa(b.bytes),
	}
	failed := b.child(ctx, r, nil, "k6.log", env, k6, "run", "--quiet", "--summary-export", summary, filepath.Join(b.tools, "k6", "mix.js"))
	raw, err := os.ReadFile(summary)
	if err != nil {
		return errors.Join(failed, err)
	}
	if err := readK6(raw, r); err != nil {
		return err
	}
	r.Seconds = b.each.Seconds()
	if failed != nil && len(r.Errors) == 0 { // with errors it fails, too, and says less of it
		return failed
	}
	return nil
}

// readK6 reads what k6 writes with --summary-export.
func readK6(raw []byte, r *loaderRun) error {
	var seen struct {
		Metrics map[string]map[string]any
	}
	if err := json.Unmarshal(raw, &seen); err != nil {
		return fmt.Errorf("k6: %w", err)
	}
	of := func(metric, what string) float64 {
		v, _ := seen.Metrics[metric][what].(float64) // of what never was it says nothing
		return v
	}
	for _, name := range loadNames {
		m := name + "_ms"
		r.Classes[name] = &loaderClass{int64(of(m, "count")), of(m, "med"), of(m, "p(95)"), of(m, "p(99)"), of(m, "max")}
	}
	r.Answers = int64(of("http_reqs", "count"))
	if n := int64(of("problems", "count")); n > 0 {
		r.Errors["problems, k6.log"] = n
	}
	return nil
}

func (b *loadersBench) jmeter(ctx context.Context, target string, r *loaderRun) error {
	if _, err := exec.LookPath("jmeter"); err != nil && os.Getenv("JMETER_HOME") == "" {
		r.Missing = "JMeter: packaging/dev/deps.sh load"
		return nil
	}
	jar, err := filepath.Abs(filepath.Join(b.built, "yinjian-jmeter.jar"))
	if err != nil {
		return err
	}
	plans := filepath.Join(b.tools, "jmeter")
	if out, err := exec.CommandContext(ctx, filepath.Join(plans, "build.sh"), jar).CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	samples, log := filepath.Join(b.folder, "jmeter.jtl"), filepath.Join(b.folder, "jmeter.log")
	if err := errors.Join(os.RemoveAll(samples), os.RemoveAll(log)); err != nil {
		return err
	}
	err = b.child(ctx, r, nil, "jmeter.out", []string{"YINJIAN_JMETER_JAR=" + jar}, filepath.Join(plans, "run.sh"), "-Jtarget="+target,
		"-Jusers="+strconv.Itoa(b.users), "-Jramp="+whole(b.warm), "-Jseconds="+whole(b.warm+b.each), "-Jbatch="+strconv.Itoa(b.batch), "-Jbytes="+strconv.Itoa(b.bytes),
		"-l", samples, "-j", log)
	if err != nil {
		return err
	}
	f, err := os.Open(samples)
	if err != nil {
		return err
	}
	defer f.Close()
	r.Version = jmeterVersion(log)
	return readJMeter(f, b.warm, r)
}

// jmeterVersion is what it says of itself in its log.
func jmeterVersion(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if _, after, ok := strings.Cut(lines.Text(), "Version "); ok {
			return strings.TrimSpace(after)
		}
	}
	return ""
}

// readJMeter reads a file of samples, of which those that began while the users did are told apart.
func readJMeter(in io.Reader, ramp time.Duration, r *loaderRun) error {
	rows, err := csv.NewReader(in).ReadAll()
	if err != nil {
		return fmt.Errorf("JMeter: %w", err)
	}
	if len(rows) < 2 {
		return errors.New("JMeter: 没有样本，见 jmeter.log (no samples)")
	}
	column := map[string]int{}
	for i, name := range rows[0] {
		column[name] = i
	}
	for _, name := range []string{"timeStamp", "elapsed", "label", "responseCode", "responseMessage", "success"} {
		if _, ok := column[name]; !ok {
			return fmt.Errorf("JMeter: 没有 %s 一列 (no such column)", name)
		}
	}
	type sample struct{ at, took int64 }
	all := make([]sample, 0, len(rows)-1)
	first := int64(-1)
	for _, row := range rows[1:] {
		at, err := strconv.ParseInt(row[column["timeStamp"]], 10, 64)
		took, err2 := strconv.ParseInt(row[column["elapsed"]], 10, 64)
		if err := errors.Join(err, err2); err != nil {
			return fmt.Errorf("JMeter: %w", err)
		}
		all = append(all, sample{at, took})
		if first < 0 || at < first {
			first = at
		}
		if row[column["success"]] != "true" {
			r.Errors[row[column["responseCode"]]+" "+row[column["responseMessage"]]]++
		}
	}
	r.Answers = int64(len(all))
	from, last := first+ramp.Milliseconds(), int64(0)
	took := map[string]*histogram{}
	for i, s := range all {
		last = max(last, s.at+s.took)
		if s.at < from {
			continue
		}
		label := rows[i+1][column["label"]]
		if took[label] == nil {
			took[label] = &histogram{}
		}
		took[label].add(time.Duration(s.took) * time.Millisecond)
	}
	r.Seconds = float64(last-from) / 1000
	for label, h := range took {
		r.Classes[label] = &loaderClass{h.n, h.quantile(0.5), h.quantile(0.95), h.quantile(0.99), float64(h.most) / float64(time.Millisecond)}
	}
	return nil
}

func (r *loaderRun) failures() (n int64) {
	for _, one := range r.Errors {
		n += one
	}
	return n
}

func (r *loaderRun) requests() (n int64) {
	for _, c := range r.Classes {
		n += c.Requests
	}
	return n
}

// reportLoaders prints and stores the results; where anything failed it ends with 1.
func (b *loadersBench) reportLoaders() error {
	m := machineOf(b.dir, b.now())
	page := loadersPage(m, b)
	fmt.Print(page)
	if b.results != "" {
		j, err := json.MarshalIndent(struct {
			Machine machineInfo  `json:"machine"`
			Users   int          `json:"users"`
			Mix     string       `json:"mix"`
			Batch   int          `json:"batch"`
			Bytes   int          `json:"document_bytes"`
			Loaders []*loaderRun `json:"loaders"`
		}{m, b.users, b.mix.String(), b.batch, b.bytes, b.runs}, "", " ")
		if err != nil {
			return err
		}
		err = errors.Join(os.MkdirAll(b.results, 0o755), os.WriteFile(filepath.Join(b.results, "loaders.md"), []byte(page), 0o644),
			os.WriteFile(filepath.Join(b.results, "loaders.json"), append(j, '\n'), 0o644))
		if err != nil {
			return err
		}
	}
	for _, r := range b.runs {
		if r.failures() > 0 {
			return errFound
		}
	}
	return nil
}

func loadersPage(m machineInfo, b *loadersBench) string {
	var out strings.Builder
	fmt.Fprintf(&out, "# Measured by `make load-tools`: three loaders, one mix\n\nWritten by the program; not to be edited. Definitions: `yinjian bench-loaders --help`.\n\n"+
		"%s, revision %s, %s; %s, %d cores, Linux %s; %s; load average %s\n\n%d users, no pause (k6: about %d requests a second by all of them), mix %s, batches of %d, documents of %d bytes; %v each after a warm-up of %v\n\n",
		m.At, m.Revision, m.Go, m.CPU, m.Cores, m.Kernel, m.Filesystem, m.Load, b.users, k6Rate, b.mix, b.batch, b.bytes, b.each, b.warm)
	fmt.Fprint(&out, "| 工具 loader | 版本 version | 请求 requests | 每秒 a second | 错误 errors (= 0) | 施压者处理器 loader's CPU, µs a request | 设备与密码机 appliance and machine, µs a request | 施压者内存 loader's memory, MB | 用时 took, s |\n"+
		"| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, r := range b.runs {
		if r.Missing != "" {
			fmt.Fprintf(&out, "| %s | | | | 未运行 not run (%s) | | | | |\n", r.Name, r.Missing)
			continue
		}
		each := 1e6 / float64(max(1, r.Answers))
		fmt.Fprintf(&out, "| %s | %s | %d | %.0f | %d | %.0f | %.0f | %.0f | %.0f |\n", r.Name, cmp.Or(r.Version, "?"), r.requests(), float64(r.requests())/r.Seconds,
			r.failures(), r.OwnCPU*each, r.OtherCPU*each, float64(r.Memory)/1e6, r.Took)
	}
	fmt.Fprint(&out, "\n## Latency, ms\n\n| 工具 loader | 类 class | 请求 requests | p50 | p95 | p99 | 最慢 slowest |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |\n")
	for _, r := range b.runs {
		for _, name := range slices.Sorted(maps.Keys(r.Classes)) {
			c := r.Classes[name]
			fmt.Fprintf(&out, "| %s | %s | %d | %.1f | %.1f | %.1f | %.0f |\n", r.Name, name, c.Requests, c.P50, c.P95, c.P99, c.Most)
		}
	}
	for _, r := range b.runs {
		for _, code := range slices.Sorted(maps.Keys(r.Errors)) {
			fmt.Fprintf(&out, "\n%s: %d × %s\n", r.Name, r.Errors[code], code)
		}
	}
	return out.String()
}
