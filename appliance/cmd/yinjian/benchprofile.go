package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Parts of the appliance that a profile is divided among: a sample belongs to the innermost of its frames that is one of
// ours or of those named here. The first prefix that fits decides.
var profileParts = []struct{ part, prefix string }{
	{"memory: allocation and garbage collection", "runtime.mallocgc"},
	{"memory: allocation and garbage collection", "runtime.gc"},
	{"memory: allocation and garbage collection", "runtime.bgsweep"},
	{"memory: allocation and garbage collection", "runtime.(*mheap)"},
	{"journal: SQLite", "yinjian/dbdriver/sqlite.(*Journal)"},
	{"journal: SQLite", "yinjian/dbdriver/sqlite.(*refIndex)"},
	{"projection: SQLite", "yinjian/dbdriver/sqlite.(*Central)"},
	{"projection: rows and MAC", "yinjian/appliance/audit.(*Shipper)"},
	{"projection: rows and MAC", "yinjian/appliance/audit.(*ProjectedBatch)"},
	{"projection: rows and MAC", "yinjian/appliance/audit.(*ProjectedRow)"},
	{"projection: rows and MAC", "yinjian/appliance/audit.Project"},
	{"projection: reading entries back", "yinjian/appliance/audit.(*Journal).Range"},
	{"journal: entries, hashes, tree", "yinjian/appliance/audit."},
	{"verification of the fresh signature", "github.com/emmansun/gmsm/sm2."},
	{"key: e = SM3(ZA, M), encoding", "yinjian/hsm."},
	{"worker: calls over the pipe", "yinjian/hsm/worker."},
	{"timestamp token and CMS", "yinjian/tsa."},
	{"timestamp token and CMS", "yinjian/appliance/cms."},
	{"certificates and CRLs", "yinjian/appliance/pki"},
	{"certificates and CRLs", "github.com/emmansun/gmsm/smx509."},
	{"consent and directory", "yinjian/appliance/account."},
	{"consent and directory", "yinjian/appliance/evidence."},
	{"signing procedure", "yinjian/appliance/sign."},
	{"request: JSON", "encoding/json."},
	{"request: JSON", "yinjian/api.decode"},
	{"request: JSON", "yinjian/api.(*decoder)"},
	{"request: HMAC", "yinjian/api/wire."},
	{"request: limits, nonce, routing", "yinjian/api."},
	{"request: limits, nonce, routing", "github.com/labstack/"},
	{"TLS", "crypto/tls."},
	{"HTTP", "net/http."},
	{"", "yinjian/dbdriver/sqlite."}, // used by several: whoever called it
	{"appliance, other", "yinjian/"},
	{"scheduler and idle", "runtime."},
}

// A profileTable says where the appliance's processor time went under one load, and how much memory it asked for.
type profileTable struct {
	Load  string        `json:"load"`
	Total float64       `json:"seconds"`
	Ops   int64         `json:"ops"`
	Parts []profilePart `json:"parts"`

	AllocBytes   float64       `json:"alloc_bytes_an_operation"`
	AllocObjects float64       `json:"alloc_objects_an_operation"`
	AllocParts   []profilePart `json:"alloc_parts"`

	stacks []profileStack
}

type profilePart struct {
	Part  string  `json:"part"`
	Share float64 `json:"share"`
}

// A profileStack is one stack of samples: what they are worth together, in µs or bytes, and its frames, the innermost first.
type profileStack struct {
	value  float64
	frames []string
}

func (p profileTable) print(out *strings.Builder) {
	fmt.Fprintf(out, "\n## Where the appliance's time goes: %s\n\n%d operations, %.2f s of samples.\n\n| part | share | µs each |\n| --- | ---: | ---: |\n", p.Load, p.Ops, p.Total)
	for _, part := range p.Parts {
		if part.Share >= 0.005 {
			fmt.Fprintf(out, "| %s | %.1f %% | %.1f |\n", part.Part, 100*part.Share, 1e6*part.Share*p.Total/float64(p.Ops))
		}
	}
	fmt.Fprintf(out, "\nMemory asked for, an operation: %.1f kB in %.0f pieces.\n\n| part | share | kB each |\n| --- | ---: | ---: |\n", p.AllocBytes/1000, p.AllocObjects)
	for _, part := range p.AllocParts {
		if part.Share >= 0.02 {
			fmt.Fprintf(out, "| %s | %.1f %% | %.2f |\n", part.Part, 100*part.Share, part.Share*p.AllocBytes/1000)
		}
	}
}

// profiles loads the appliance while it profiles itself.
func (b *bench) profiles(ctx context.Context) error {
	file := filepath.Join(b.dir, "serve-cpu.prof")
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", b.appliance))
	if err != nil {
		return err
	}
	if !bytes.Contains(line, []byte("\x00--profile\x00"+strings.TrimSuffix(file, "-cpu.prof")+"\x00")) { // the signal would end it
		return usageError{fmt.Errorf("设备须以 serve --profile %s 启动 (start the appliance with that flag)", strings.TrimSuffix(file, "-cpu.prof"))}
	}
	for _, name := range []string{"sign", "stamped"} {
		t, err := profileOf(ctx, name, b.appliance, file, func() (int64, error) {
			ops, err := b.byName[name].run(ctx, b.profile)
			if err == nil {
				_, err = b.shipped(ctx)
			}
			return ops, err
		})
		if err != nil {
			return err
		}
		b.profiled = append(b.profiled, t)
	}
	return nil
}

// profileOf runs the load while the process of this program with that pid profiles itself into file.
func profileOf(ctx context.Context, name string, pid int, file string, load func() (int64, error)) (profileTable, error) {
	var none profileTable
	// signalled waits for the file that answers the signal: a process that has no time now begins and ends later.
	signalled := func(answer string) error {
		_ = os.Remove(answer) // there may be none
		if err := syscall.Kill(pid, syscall.SIGUSR1); err != nil {
			return err
		}
		for try := 0; ; try++ {
			if _, err := os.Stat(answer); err == nil {
				return nil
			} else if try == 3000 {
				return fmt.Errorf("no profile was made: %w", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	if err := signalled(file + profileBegun); err != nil {
		return none, err
	}
	ops, err := load()
	if err != nil {
		return none, err
	}
	if err := signalled(file); err != nil { // renamed when it is whole
		return none, err
	}
	t := profileTable{Load: name, Ops: ops}
	if t.stacks, err = stacksOf(ctx, "-unit=us", file); err != nil {
		return none, err
	}
	t.Parts, t.Total = divide(t.stacks)
	t.Total /= 1e6
	raw, err := os.ReadFile(file + allocTotals)
	if err != nil {
		return none, err
	}
	var totals allocated
	if err := json.Unmarshal(raw, &totals); err != nil {
		return none, err
	}
	t.AllocBytes, t.AllocObjects = float64(totals.Bytes)/float64(ops), float64(totals.Objects)/float64(ops)
	stacks, err := stacksOf(ctx, "-unit=B", "-sample_index=alloc_space", "-base", file+allocBefore, file+allocAfter)
	if err != nil {
		return none, err
	}
	t.AllocParts, _ = divide(stacks)
	return t, nil
}

// stacksOf has `go tool pprof` print the stacks of a profile of this program.
func stacksOf(ctx context.Context, args ...string) ([]profileStack, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	last := len(args) - 1
	args = append(append([]string{"tool", "pprof", "-traces"}, args[:last]...), self, args[last])
	traces, err := exec.CommandContext(ctx, "go", args...).Output()
	if err != nil {
		return nil, fmt.Errorf("go tool pprof: %w", err)
	}
	return parseTraces(string(traces)), nil
}

// parseTraces reads what `go tool pprof -traces` prints: stacks divided by dashed lines, each with its value and unit before the
// innermost frame.
func parseTraces(traces string) (all []profileStack) {
	var s profileStack
	end := func() {
		if s.value > 0 && len(s.frames) > 0 {
			all = append(all, s)
		}
		s = profileStack{}
	}
	inside := false
	for line := range strings.SplitSeq(traces, "\n") {
		if strings.HasPrefix(line, "-----------") {
			end()
			inside = true
			continue
		}
		frame := strings.TrimSpace(line)
		if !inside || frame == "" {
			continue
		}
		if s.value == 0 {
			word, rest, _ := strings.Cut(frame, " ")
			v, err := strconv.ParseFloat(strings.TrimRight(word, "usB"), 64)
			if err != nil {
				continue // a label of the stack
			}
			s.value, frame = v, strings.TrimSpace(rest)
		}
		s.frames = append(s.frames, frame)
	}
	end()
	return all
}

// divide gives each stack to a part, and answers the parts' shares, the largest first, and the sum of all.
func divide(stacks []profileStack) (parts []profilePart, total float64) {
	shares := map[string]float64{}
	for _, s := range stacks {
		part := ""
		for _, frame := range s.frames {
			if part != "" && part != "scheduler and idle" {
				break
			}
			for _, p := range profileParts {
				if strings.HasPrefix(frame, p.prefix) {
					part = p.part
					break
				}
			}
		}
		if part == "" {
			part = "other"
		}
		shares[part] += s.value
		total += s.value
	}
	for name, v := range shares {
		parts = append(parts, profilePart{name, v / math.Max(total, 1e-9)})
	}
	slices.SortFunc(parts, func(a, b profilePart) int { return int(math.Copysign(1, b.Share-a.Share)) })
	return parts, total
}

// flame draws stacks as a flame graph, SVG 1.1 without script: the width of a frame is its share, what it calls stands on it. A title
// on each says its name and share.
func flame(title string, stacks []profileStack) []byte {
	const width, row, least = 1200.0, 17.0, 0.002
	type node struct {
		name  string
		value float64
		calls map[string]*node
	}
	root := &node{name: "all", calls: map[string]*node{}}
	for _, s := range stacks {
		root.value += s.value
		at := root
		for _, frame := range slices.Backward(s.frames) {
			frame = strings.TrimSuffix(frame, " (inline)")
			next := at.calls[frame]
			if next == nil {
				next = &node{name: frame, calls: map[string]*node{}}
				at.calls[frame] = next
			}
			next.value += s.value
			at = next
		}
	}
	var deepest func(n *node) int
	deepest = func(n *node) (most int) {
		for _, c := range n.calls {
			if c.value >= least*root.value {
				most = max(most, deepest(c))
			}
		}
		return most + 1
	}
	height := float64(deepest(root))*row + 40
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="monospace" font-size="11">`+"\n", width, height)
	fmt.Fprintf(&out, `<rect width="%.0f" height="%.0f" fill="#ffffff"/><text x="8" y="18" font-size="14">%s</text>`+"\n", width, height, xmlText(title))
	var draw func(n *node, x float64, depth int)
	draw = func(n *node, x float64, depth int) {
		wide, y := width*n.value/root.value, height-float64(depth+1)*row-4
		short := n.name[strings.LastIndexByte(n.name, '/')+1:]
		fmt.Fprintf(&out, `<g><title>%s, %.1f %%</title><rect x="%.1f" y="%.1f" width="%.1f" height="%.0f" fill="%s" stroke="#ffffff" stroke-width="0.5"/>`,
			xmlText(n.name), 100*n.value/root.value, x, y, wide, row-1, flameColour(n.name))
		if room := int(wide / 6.8); room > 3 {
			fmt.Fprintf(&out, `<text x="%.1f" y="%.1f">%s</text>`, x+3, y+12, xmlText(short[:min(len(short), room)]))
		}
		out.WriteString("</g>\n")
		calls := make([]*node, 0, len(n.calls))
		for _, c := range n.calls {
			calls = append(calls, c)
		}
		slices.SortFunc(calls, func(a, b *node) int { return strings.Compare(a.name, b.name) })
		for _, c := range calls {
			if c.value >= least*root.value {
				draw(c, x, depth+1)
			}
			x += width * c.value / root.value
		}
	}
	if root.value > 0 {
		draw(root, 0, 0)
	}
	out.WriteString("</svg>\n")
	return []byte(out.String())
}

// flameColour tells our own code, cryptography, SQLite and the rest apart.
func flameColour(frame string) string {
	switch {
	case strings.HasPrefix(frame, "yinjian/"):
		return "#f0b78a"
	case strings.Contains(frame, "gmsm") || strings.HasPrefix(frame, "crypto/"):
		return "#a9cdea"
	case strings.Contains(frame, "sqlite3"):
		return "#b7dcb0"
	}
	return "#dddddd"
}
