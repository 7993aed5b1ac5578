// Command yinjian-console shows, on the screen and on the serial line of a machine that runs the sealed image, what state
// the appliance is in. It reads nothing from there: there is nobody to log in.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"yinjian/api/client"
	"yinjian/iso/layout"
)

// between is how often the appliance is asked. Something is written only when the answer changed.
const between = 5 * time.Second

func main() {
	text, err := os.ReadFile(layout.ImageFile)
	if err != nil {
		fmt.Fprintln(os.Stderr, "yinjian-console:", err)
		os.Exit(1)
	}
	image, err := layout.ParseImage(text)
	if err != nil {
		fmt.Fprintln(os.Stderr, "yinjian-console:", err)
		os.Exit(1)
	}
	admin := client.NewAdmin(filepath.Join(layout.Dir, "run", "admin.sock"))
	last := ""
	for {
		ctx, stop := context.WithTimeout(context.Background(), between)
		answer, err := admin.State(ctx)
		stop()
		if page := page(image, answer, err, addresses(), kernel(laidDown, "/proc/sys")); page != last {
			last = page
			// A serial line sends carriage returns of its own only where somebody set it so.
			fmt.Print(strings.ReplaceAll(page, "\n", "\r\n"))
		}
		time.Sleep(between)
	}
}

// addresses are those at which the machine can be reached.
func addresses() []string {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var out []string
	for _, a := range all {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() {
			out = append(out, ip.IP.String())
		}
	}
	slices.Sort(out)
	return out
}

// laidDown are the kernel's parameters as the image sets them, and the last of its start.
var laidDown = []string{"/usr/lib/sysctl.d/90-yinjian.conf", "/usr/lib/yinjian/sealed.conf"}

// parameters say how the running kernel's lie to what was laid down: as it says, otherwise (each by name), or for root alone to read.
type parameters struct {
	same           int
	hidden, others []string
}

// kernel compares the parameters in files, lines of name = value, with those under root. What cannot be read is named, as what differs is.
func kernel(files []string, root string) (p parameters) {
	for _, file := range files {
		text, err := os.ReadFile(file)
		found := 0
		for line := range strings.Lines(string(text)) {
			name, want, is := strings.Cut(line, "=")
			if name, want = strings.TrimSpace(name), strings.TrimSpace(want); !is || strings.HasPrefix(name, "#") {
				continue
			}
			found++
			got, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(strings.ReplaceAll(name, ".", "/"))))
			switch said := strings.TrimSpace(string(got)); {
			case errors.Is(err, fs.ErrPermission):
				p.hidden = append(p.hidden, name)
			case errors.Is(err, fs.ErrNotExist):
				p.others = append(p.others, name+" 没有 (none)")
			case err != nil:
				p.others = append(p.others, fmt.Sprintf("%s (%v)", name, err))
			case said != want:
				p.others = append(p.others, name+"="+said)
			default:
				p.same++
			}
		}
		if err != nil || found == 0 {
			p.others = append(p.others, file)
		}
	}
	return p
}

// status is what is shown of the body of /admin/v1/state, in any state.
type status struct {
	State     string            `json:"state"`
	Ready     bool              `json:"ready"`
	Node      string            `json:"node"`
	Campus    string            `json:"campus"`
	Step      string            `json:"step"`
	Next      string            `json:"next"`
	Warnings  []string          `json:"warnings"`
	Listeners map[string]string `json:"listeners"`
	Restore   *restore          `json:"restore"`

	Certificate *struct {
		Fingerprint string `json:"fingerprint"`
	} `json:"certificate"`
}

// restore is what an engineer has to type to send a backup to this machine, and how far that is.
type restore struct {
	Address     string `json:"address"`
	Fingerprint string `json:"fingerprint"`
	Token       string `json:"token"`
	State       string `json:"state"`
	Files       int    `json:"files"`
	Percent     int    `json:"percent"`
	Refused     int    `json:"refused"`
	Failure     string `json:"failure"`
}

var states = map[string]string{
	"uninitialised": "未初始化", "locked": "已锁定，等待解锁", "starting": "正在启动", "operational": "运行", "failed": "启动失败", "stopping": "正在停机",
}

// mostWarnings fit on a screen; `yinjian status` has all.
const mostWarnings = 5

// page is what is written. Of the appliance's words only printable characters are let through: a name must not become a
// terminal's command.
func page(image layout.Image, answer json.RawMessage, err error, addresses []string, kernel parameters) string {
	var b strings.Builder
	line := func(format string, args ...any) {
		text := strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return -1
			}
			return r
		}, fmt.Sprintf(format, args...))
		b.WriteString(text + "\n")
	}
	b.WriteString("\n")
	line("印鉴 Yinjian %s，镜像 image %d", image.Version, image.Index)
	if image.Variant == layout.Evaluation {
		line("评估版：软件密码机，未经认证，不得用于生产 (EVALUATION: software cipher machine, not certified)")
	}
	if len(kernel.others) == 0 {
		line("内核参数 kernel: %d 项与规定相同 (as laid down)", kernel.same)
	} else {
		shown := kernel.others[:min(len(kernel.others), mostWarnings)]
		line("! 内核参数 %d 项与规定不同 (not as laid down): %s", len(kernel.others), strings.Join(shown, " "))
	}
	if len(kernel.hidden) > 0 {
		line("  只有 root 能读，未对照 (not compared): %s", strings.Join(kernel.hidden, " "))
	}
	if addresses == nil {
		addresses = []string{"没有 (none)"}
	}
	line("地址 address: %s", strings.Join(addresses, " "))
	var s status
	if err == nil {
		err = json.Unmarshal(answer, &s)
	}
	if err != nil {
		line("状态 STATE: 没有应答 (no answer)")
		return b.String()
	}
	name := states[s.State]
	if s.State == "operational" && !s.Ready {
		name += "，现在不能签名 (not ready)"
	}
	line("状态 STATE: %s %s", s.State, name)
	if s.Node != "" {
		line("节点 node: %s  院区 campus: %s", s.Node, s.Campus)
	}
	for _, at := range slices.Sorted(func(yield func(string) bool) {
		for what, address := range s.Listeners {
			if !yield(what + " " + address) {
				return
			}
		}
	}) {
		line("监听 listens: %s", at)
	}
	if c := s.Certificate; c != nil {
		line("证书指纹 TLS certificate, SHA-256:")
		line("  %s", c.Fingerprint)
	}
	if r := s.Restore; r != nil {
		line("等待备份 RESTORE: %s", r.Address)
		line("指纹 fingerprint:")
		line("  %s", r.Fingerprint)
		line("恢复码 token: %s", r.Token)
		line("已收到 received: %d", r.Files)
		if r.State == "restoring" {
			line("正在恢复 restoring: %d%%", r.Percent)
		}
		if r.Refused > 0 {
			line("! 出示过错误的恢复码 %d 次 (wrong tokens were shown)", r.Refused)
		}
		if r.Failure != "" {
			line("! 未恢复 (not restored): %s", r.Failure)
		}
	}
	if s.Step != "" {
		line("进行到 step: %s", s.Step)
	}
	for i, w := range s.Warnings {
		if i == mostWarnings {
			line("…… 另有 %d 条 (more)", len(s.Warnings)-i)
			break
		}
		line("! %s", w)
	}
	if s.Next != "" {
		line("下一步 next: %s", s.Next)
	}
	return b.String()
}
