package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/diag"
	"yinjian/ntp/sysclock"
)

func diagCommand() *cobra.Command {
	var dir, out string
	var lines int
	c := &cobra.Command{
		Use:   "diag --dir DIR [--out FILE.tar.gz]",
		Short: "诊断包：状态、配置、运行日志末尾、版本等，不含秘密 (a bundle for a diagnosis, without secrets)",
		Long: `写出一个 tar.gz，交给维护人员看故障：设备状态、去掉秘密的配置、运行日志的末尾、程序与系统版本、各协程的调用栈、中心库各表的行数、日志的分段与
最近检查点、设备证书、密码机、告警。设备不在运行时，写出目录里看得到的，并注明缺什么。

不含口令、密钥、应用凭据、签名人姓名与病历内容。写出之前，用设备的每一个口令、密钥文件的内容（原文、十六进制、base64）搜索全部成员，命中即隐去并注明；
像口令的文字也隐去；仍有命中则不写出，退出码 1。请在交出之前自己再看一遍。

Writes a tar.gz for whoever looks for a fault. Every secret that the appliance has in a file is searched for in every form
before anything is written; what looks like a secret is taken out too.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			b, err := collect(c.Context(), dir, lines)
			if err != nil {
				return err
			}
			if out == "" {
				out = b.name + ".tar.gz"
			}
			if err := b.write(out); err != nil {
				return err
			}
			fmt.Printf("已写出 (written)：%s，%d 个成员\n", out, len(b.members))
			for _, m := range b.missing {
				fmt.Printf("缺 (missing)：%s\n", m)
			}
			for _, h := range b.hidden {
				fmt.Printf("已隐去 (redacted)：%s\n", h)
			}
			return nil
		},
	}
	required(c, &dir, "dir", "设备目录 (the appliance's folder)")
	c.Flags().StringVar(&out, "out", "", "写到哪个文件；缺省为当前目录下 yinjian-diag-节点-时刻.tar.gz (where)")
	c.Flags().IntVar(&lines, "log-lines", 2000, "运行日志取多少行 (lines of the running log)")
	return c
}

// A bundle is being put together.
type bundle struct {
	name    string
	at      time.Time
	members map[string][]byte
	free    map[string]bool // members with text that nobody has chosen: the log
	missing []string
	hidden  []string
	scanner *diag.Scanner
}

// collect gathers what there is, and takes secrets out of it.
func collect(ctx context.Context, dir string, lines int) (*bundle, error) {
	cfg, err := appliance.LoadConfig(dir)
	if err != nil {
		return nil, err
	}
	sys, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	b := &bundle{at: sys.Realtime().UTC(), members: map[string][]byte{}, free: map[string]bool{}}
	b.name = "yinjian-diag-" + cfg.Node + "-" + b.at.In(audit.Beijing).Format("20060102T150405")
	if b.scanner, err = appliance.NewScanner(cfg, dir); err != nil {
		return nil, fmt.Errorf("口令文件读不出，无法确认诊断包里没有它 (a secret cannot be read, so that nothing could be searched for it): %w", err)
	}
	b.scanner.Add("登录会话 (the session)", []byte(session(dir)))
	// 1. What the running appliance says.
	f := adminFlags{dir: dir, output: "json"}
	if a, err := f.client(); err != nil {
		b.lacks("运行中的状态 (the running state)", err)
	} else {
		defer a.Close()
		b.ask(ctx, a, lines)
	}
	// 2. What its folder shows.
	shown, err := cfg.Shown()
	if err != nil {
		return nil, err
	}
	b.members["config.toml"] = shown
	if err := b.files(dir); err != nil {
		b.lacks("文件清单 (the files)", err)
	}
	if err := b.journal(ctx, dir); err != nil {
		b.lacks("日志的分段与检查点 (the journal)", err)
	}
	for _, pattern := range []string{"*.pem", "*.crl"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			data, err := readLimited(name, 4<<20)
			if err != nil {
				b.lacks(filepath.Base(name), err)
				continue
			}
			b.members["public/"+filepath.Base(name)] = data
		}
	}
	// 3. Program and machine.
	b.system()
	return b, b.clean()
}

func (b *bundle) lacks(what string, err error) {
	b.missing = append(b.missing, fmt.Sprintf("%s：%v", what, err))
}

// ask takes the answers of the running appliance. Names of people are left out: none is needed to find a fault.
func (b *bundle) ask(ctx context.Context, a *client.Admin, lines int) {
	for name, question := range map[string]func(context.Context) (json.RawMessage, error){
		"state": a.State, "time": a.TimeStatus, "machines": a.ListMachines, "certificates": a.ListCertificates, "crls": a.ListCRLs, "keys": a.ListKeys,
		"tsa": a.StampStatus, "peer": a.PeerStatus, "alarms": a.ListAlarms, "process": a.Diagnosis,
	} {
		answer, err := question(ctx)
		var v any
		if err == nil {
			err = json.Unmarshal(answer, &v)
		}
		if err != nil {
			b.lacks(name, explain(err))
			continue
		}
		if name == "process" { // the longest of them to be read by people
			if p, ok := v.(map[string]any); ok {
				for _, long := range []string{"goroutines", "build"} {
					text, _ := p[long].(string)
					b.members[long+".txt"] = []byte(text)
					delete(p, long)
				}
			}
		}
		text, err := json.MarshalIndent(withoutSecrets(withoutPeople(v)), "", "  ")
		if err != nil {
			b.lacks(name, err)
			continue
		}
		b.members[name+".json"] = append(text, '\n')
	}
	answer, err := a.ReadLog(ctx, wire.ReadLog{Lines: lines})
	var log struct{ Lines []string }
	if err == nil {
		err = json.Unmarshal(answer, &log)
	}
	if err != nil {
		b.lacks("运行日志 (the running log)", explain(err))
		return
	}
	b.members["log.txt"], b.free["log.txt"] = []byte(strings.Join(log.Lines, "\n")+"\n"), true
}

// withoutPeople leaves out of a list what concerns signers: certificates and keys of theirs are counted.
func withoutPeople(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for name, w := range v {
			v[name] = withoutPeople(w)
		}
	case []any:
		left, staff := []any{}, 0
		for _, one := range v {
			m, ok := one.(map[string]any)
			owner, _ := m["owner"].(string)
			if ok && strings.HasPrefix(owner, "signer:") {
				staff++
				continue
			}
			left = append(left, withoutPeople(one))
		}
		if staff > 0 {
			left = append(left, map[string]any{"signers_left_out": staff})
		}
		return left
	}
	return v
}

// files lists the folder: names, sizes, permissions, times; nothing of what is in them.
func (b *bundle) files(dir string) error {
	var text strings.Builder
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		rel, rerr := filepath.Rel(dir, name)
		if err != nil || rerr != nil {
			fmt.Fprintf(&text, "?\t%v\n", errors.Join(err, rerr))
			return nil
		}
		if top, _, _ := strings.Cut(rel, string(filepath.Separator)); top == "credentials" && top != rel {
			return nil // named for applications
		}
		info, err := d.Info()
		if err != nil {
			return nil // it went away meanwhile
		}
		fmt.Fprintf(&text, "%s\t%d\t%s\t%s\n", info.Mode(), info.Size(), info.ModTime().UTC().Format(time.RFC3339), rel)
		return nil
	})
	b.members["files.txt"] = []byte(text.String())
	return err
}

// journal says how far the journal is.
func (b *bundle) journal(ctx context.Context, dir string) error {
	store, err := openJournal(ctx, filepath.Join(dir, "journal"))
	if err != nil {
		return err
	}
	defer store.Close()
	size, last, err := store.Head(ctx)
	if err != nil {
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "entries %d\n", size)
	if last != nil {
		fmt.Fprintf(&text, "last leaf %x chain %x kind %s\n", last.Leaf, last.Chain, last.Kind)
	}
	segments, err := store.Segments(ctx)
	if err != nil {
		return err
	}
	for _, s := range segments {
		fmt.Fprintf(&text, "segment %d first %d count %d sealed %v error %v\n", s.Number, s.First, s.Count, s.Seal != nil, s.Err)
	}
	c, err := store.LastCheckpoint(ctx)
	if err == nil {
		fmt.Fprintf(&text, "checkpoint\n%ssignature %x\n", c.Note, c.Signature)
	} else if errors.Is(err, audit.ErrNotFound) {
		err = nil
	}
	b.members["journal.txt"] = []byte(text.String())
	return err
}

// system describes program and machine.
func (b *bundle) system() {
	var text strings.Builder
	fmt.Fprintf(&text, "yinjian %s\n%s %s/%s, %d processors\n", appliance.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			fmt.Fprintf(&text, "%s=%s\n", s.Key, s.Value)
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		fmt.Fprintf(&text, "%s %s %s\n", unix.ByteSliceToString(u.Sysname[:]), unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:]))
	}
	for _, name := range []string{"/etc/os-release", "/proc/meminfo", "/proc/loadavg", "/proc/uptime"} {
		if data, err := readLimited(name, 64<<10); err == nil {
			fmt.Fprintf(&text, "\n# %s\n%s", name, data)
		}
	}
	b.members["system.txt"] = []byte(text.String())
}

// clean takes secrets out of the members, and refuses to go on if one is still there.
func (b *bundle) clean() error {
	for _, name := range slices.Sorted(maps.Keys(b.members)) {
		clean, found := b.scanner.Clean(b.members[name], b.free[name])
		b.members[name] = clean
		for _, what := range found {
			b.hidden = append(b.hidden, fmt.Sprintf("%s 里的 %s", name, what))
		}
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s\n%s（本机时钟）\n\n成员 (members)\n", b.name, b.at.Format(time.RFC3339))
	for _, name := range slices.Sorted(maps.Keys(b.members)) {
		fmt.Fprintf(&text, "  %s %d\n", name, len(b.members[name]))
	}
	fmt.Fprintln(&text, "\n缺 (missing)")
	for _, m := range b.missing {
		fmt.Fprintf(&text, "  %s\n", m)
	}
	fmt.Fprintf(&text, "\n秘密 (secrets)：搜索了 %d 种写法；短于 6 字节、未搜索的文件：%s\n", b.scanner.Known(), strings.Join(b.scanner.Short(), "、"))
	for _, h := range b.hidden {
		fmt.Fprintf(&text, "  已隐去 %s\n", h)
	}
	clean, _ := b.scanner.Clean([]byte(text.String()), false) // a reason may repeat anything
	b.members["MANIFEST.txt"] = clean
	for name, data := range b.members {
		if found := b.scanner.Find(append([]byte(name+"\n"), data...)); len(found) > 0 {
			return fmt.Errorf("%s 里仍有 %s 的内容，没有写出 (a secret is left, nothing was written)", name, strings.Join(found, "、"))
		}
	}
	return nil
}

// write writes the archive.
func (b *bundle) write(name string) error {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	t := tar.NewWriter(z)
	for _, member := range slices.Sorted(maps.Keys(b.members)) {
		data := b.members[member]
		if err := t.WriteHeader(&tar.Header{Name: b.name + "/" + member, Mode: 0o600, Size: int64(len(data)), ModTime: b.at, Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := t.Write(data); err != nil {
			return err
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(out.Bytes())
	return errors.Join(err, f.Close())
}
