package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
)

// A console is where a person stands: the machine's screen and its serial lines, as one. It asks questions, and nothing
// typed to it is ever run.
type console struct {
	in   *bufio.Reader
	out  io.Writer
	echo func(on bool) // what is typed is shown, or not; nil where there is no terminal

	flush func()          // nil where there is no terminal, as the next
	last  func() *console // the one terminal where the last line was typed
}

// fresh forgets what was typed before it was asked for.
func (c *console) fresh() {
	if c.flush != nil {
		c.flush()
	}
}

// here is the terminal where the last line was typed, alone.
func (c *console) here() *console {
	if c.last == nil {
		return c
	}
	return c.last()
}

func (c *console) say(format string, args ...any) {
	fmt.Fprint(c.out, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "\r\n")+"\r\n")
}

// wipe takes from the screens what was shown.
func (c *console) wipe() { fmt.Fprint(c.out, "\x1b[2J\x1b[3J\x1b[H") }

// keep has the first lines of the screens stay where they are until the machine starts again: what comes scrolls below them (ECMA-48's
// cursor position, and the margins that terminals have had since DEC's VT100).
func (c *console) keep(lines int) { fmt.Fprintf(c.out, "\x1b[%dr\x1b[%d;1H", lines+1, lines+1) }

// hidden asks for what nobody else should read: nothing typed after the question is shown.
func (c *console) hidden(format string, args ...any) (string, error) {
	if c.echo != nil {
		c.echo(false)
		defer c.echo(true)
	}
	c.say(format, args...)
	return c.line()
}

// line reads what is typed, without the spaces around it.
func (c *console) line() (string, error) {
	text, err := c.in.ReadString('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(text), nil
}

// ask asks until what was typed is taken. An empty answer is the default.
func (c *console) ask(question, standard string, take func(string) error) error {
	for {
		if standard != "" {
			fmt.Fprintf(c.out, "%s [%s]: ", question, standard)
		} else {
			fmt.Fprintf(c.out, "%s: ", question)
		}
		text, err := c.line()
		if err != nil {
			return err
		}
		if text == "" {
			text = standard
		}
		if err := take(text); err != nil {
			c.say("  %v", err)
			continue
		}
		return nil
	}
}

// askDisk asks for the disk. One that is not blank is written over only after its token was typed, which nobody does by
// accident.
func (c *console) askDisk(disks []disk, least int64, a *Answers) error {
	c.say("\n可安装的硬盘 (disks):")
	for _, d := range disks {
		c.say("  %s", d)
	}
	standard := ""
	for _, d := range disks {
		if d.blank && d.size >= least {
			standard = d.name
			break
		}
	}
	err := c.ask("安装到哪一块硬盘 (install on)", standard, func(text string) error {
		a.Disk = text
		probe := *a
		for _, d := range disks { // whether it may be wiped is asked next
			if d.name == text || d.serial == text {
				probe.Wipe = d.token
			}
		}
		if text == "" {
			return fmt.Errorf("请给出硬盘名 (name a disk)")
		}
		_, err := choose(disks, probe, least)
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range disks {
		if (d.name == a.Disk || d.serial == a.Disk) && !d.blank {
			c.say("\n硬盘 %s 上已有内容，安装将永久清除它 (everything on it will be lost)。", d.name)
			return c.ask("确认请原样输入 (to confirm, type) "+d.token, "", func(text string) error {
				if text != d.token {
					return fmt.Errorf("不符 (it differs)")
				}
				a.Wipe = text
				return nil
			})
		}
	}
	return nil
}

// askAll is the installation's dialogue: the answers, and those for the appliance. What is answered is looked at at once,
// and nothing is written before the last yes.
func (c *console) askAll(disks []disk, least int64) (Answers, []byte, error) {
	a := Answers{Seal: sealTPM}
	if err := c.askMachine(disks, least, &a); err != nil {
		return a, nil, err
	}
	of, err := c.askAppliance()
	if err != nil {
		return a, nil, err
	}
	text, err := toml.Marshal(of)
	if err != nil {
		return a, nil, err
	}
	c.say("\n即将安装 (about to install):\n  硬盘 disk        %s\n  封存 seal        %s\n  恢复 recovery    %s\n  网络 network     %s %s %s %s\n  节点 node        %s %s\n  时间源 time      %s", a.Disk, a.Seal,
		a.Recovery, a.Network.Interface, orDHCP(a.Network.Address), a.Network.Gateway, strings.Join(a.Network.DNS, " "), of.Node, of.Campus, strings.Join(of.TimeSources, " "))
	return a, text, c.ask("开始安装请输入 yes (to begin, type yes)", "", func(text string) error {
		if text != "yes" {
			return fmt.Errorf("尚未开始，关机即可放弃 (nothing was written; switch the machine off to give up)")
		}
		return nil
	})
}

// applianceOf is what the dialogue asks for the appliance: of answers.toml (docs/states.md) what has no default here.
type applianceOf struct {
	Node        string   `toml:"node"`
	Campus      string   `toml:"campus"`
	Listen      string   `toml:"listen"`
	Admin       string   `toml:"admin"`
	TimeSources []string `toml:"time_sources"`
	// Administrators are the first three: "id:name" by role.
	Administrators map[string]string `toml:"administrators"`
}

// roles of the first administrators, in the order in which they are asked for.
var roles = []string{"system", "security", "audit"}

var administrator = regexp.MustCompile(`^([a-z0-9][a-z0-9.-]{1,31}) +([^:]+)$`)

var nodeName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

// askAppliance asks what the appliance and its first administrators are.
func (c *console) askAppliance() (applianceOf, error) {
	of := applianceOf{Listen: "0.0.0.0:8443", Admin: "0.0.0.0:8444", Administrators: map[string]string{}}
	c.say("")
	err := c.ask("节点名，写入全部证据，以后不可改 (name of this node, for ever)", "benbu-1", func(text string) error {
		of.Node = text
		if !nodeName.MatchString(text) {
			return fmt.Errorf("应为小写字母、数字、点、连字符 (want lower-case letters, digits, dots, hyphens)")
		}
		return nil
	})
	if err != nil {
		return of, err
	}
	err = c.ask("院区 (campus)", "本部", func(text string) error {
		of.Campus = text
		return problem.CheckText("campus", text, 128)
	})
	if err != nil {
		return of, err
	}
	err = c.ask("时间源，主机:端口，空格分隔 (NTP servers, host:port)", "", func(text string) error {
		of.TimeSources = strings.Fields(text)
		if len(of.TimeSources) == 0 {
			return fmt.Errorf("至少一个 (one at least)")
		}
		for _, s := range of.TimeSources {
			if _, port, err := net.SplitHostPort(s); err != nil || port == "" {
				return fmt.Errorf("%s 不是 主机:端口 (not host:port)", s)
			}
		}
		return nil
	})
	if err != nil {
		return of, err
	}
	c.say("\n对话装的设备用自带的软件密码机（仅评估映像）与内嵌的库。外部的密码机、中心库与其余设置写在应答盘 answers.toml 的 [settings] 里，见 docs/install.md。\n(cipher machine and database are those of the image; others, and all other settings, are given by [settings] of an answer disk)")
	c.say("\n首批管理员，系统、安全、审计各一名；一次性口令在首次启动时显示在本机屏幕上。(the first administrators; their first passwords are shown here at the first start)")
	for _, role := range roles {
		err := c.ask(role+"：登录名 姓名 (login and name)", "", func(text string) error {
			m := administrator.FindStringSubmatch(text)
			if m == nil || problem.CheckText("name", m[2], 64) != nil {
				return fmt.Errorf("应为小写字母、数字组成的登录名，空格，姓名 (want a login in lower-case letters and digits, a space, a name)")
			}
			for _, other := range of.Administrators {
				if strings.HasPrefix(other, m[1]+":") {
					return fmt.Errorf("登录名重复 (given twice)")
				}
			}
			of.Administrators[role] = m[1] + ":" + m[2]
			return nil
		})
		if err != nil {
			return of, err
		}
	}
	return of, nil
}

// askMachine asks for disk, seal, recovery key and network.
func (c *console) askMachine(disks []disk, least int64, a *Answers) error {
	c.say("\n印鉴 安装 (installation)。直接回车即取方括号内的缺省值 (Enter takes what stands in brackets)。")
	if err := c.askDisk(disks, least, a); err != nil {
		return err
	}
	err := c.ask("数据卷封存方式 (data sealed to): tpm2 / passphrase", sealTPM, func(text string) error {
		a.Seal = text
		return a.check()
	})
	if err != nil {
		return err
	}
	c.say("\n恢复密钥分给几位持有人，首次启动时在本机屏幕上逐人显示；不设则 TPM 或主板损坏时数据不可恢复。\n(holders of the recovery key, shown to each at the first start; without them a broken TPM takes the data with it)")
	err = c.ask("持有人，空格分隔，不设请直接回车 (names, or nothing)", "", func(text string) error {
		a.Recovery.Holders = strings.Fields(text)
		if len(a.Recovery.Holders) == 0 {
			return nil
		}
		return custody.CheckUnlock(a.Recovery.Holders, min(2, len(a.Recovery.Holders)-1))
	})
	if err == nil && len(a.Recovery.Holders) > 0 {
		err = c.ask("其中几位可恢复 (how many of them restore)", "2", func(text string) error {
			n, err := strconv.Atoi(text)
			if err != nil {
				return fmt.Errorf("请输入数字 (want a number)")
			}
			a.Recovery.Threshold = n
			return a.check()
		})
	}
	if err != nil {
		return err
	}
	c.say("")
	// Each is tried alone: one that is wrong is asked again, not those before it.
	field := func(question, standard string, put func(n *Network, text string)) error {
		return c.ask(question, standard, func(text string) error {
			with := *a
			put(&with.Network, text)
			if err := with.check(); err != nil {
				return err
			}
			*a = with
			return nil
		})
	}
	if err := field("网卡 (interface)", "en*", func(n *Network, text string) { n.Interface = text }); err != nil {
		return err
	}
	if err := field("本机地址/前缀长度，直接回车为 DHCP (address/prefix, Enter for DHCP)", "", func(n *Network, text string) { n.Address = text }); err != nil {
		return err
	}
	if a.Network.Address != "" {
		if err := field("网关 (gateway)", "", func(n *Network, text string) { n.Gateway = text }); err != nil {
			return err
		}
	}
	return field("DNS，空格分隔 (DNS)", "", func(n *Network, text string) { n.DNS = strings.Fields(text) })
}

func orDHCP(address string) string {
	if address == "" {
		return "DHCP"
	}
	return address
}

func (r Recovery) String() string {
	if len(r.Holders) == 0 {
		return "无 (none)"
	}
	return fmt.Sprintf("%s，任 %d 人 (any %d)", strings.Join(r.Holders, " "), r.Threshold, r.Threshold)
}
