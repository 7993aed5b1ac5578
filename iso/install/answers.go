package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance/custody"
)

// What the data volume's key is sealed to.
const (
	sealTPM        = "tpm2"       // the machine's TPM 2.0: starts unattended, as long as signed kernels start it
	sealPassphrase = "passphrase" // a person at the console, at every start
)

// Answers is what has to be known to install a machine: answers.json of the answer disk, or what a person said. What the
// appliance itself has to know stands beside it, in answers.toml (docs/states.md).
type Answers struct {
	// Disk is a kernel name (sda, nvme0n1) or a serial number; "" is the one blank disk.
	Disk string `json:"disk"`
	// Wipe allows to install over a disk that is not blank: the token that the refusal showed. It holds for what is on
	// the disk at that moment and for nothing else.
	Wipe     string   `json:"wipe"`
	Seal     string   `json:"seal"` // tpm2 or passphrase
	Recovery Recovery `json:"recovery"`
	Network  Network  `json:"network"`
	Receiver Receiver `json:"receiver"`
}

// Receiver is the BeiDou or GPS receiver of this machine, "" where there is none: then neither gpsd nor chrony runs. What
// asks it is the time source 127.0.0.1:123 of the appliance's own answers.
type Receiver struct {
	Device string `json:"device"` // ttyS0, ttyUSB0, ttyACM0, ttyAMA0
	PPS    bool   `json:"pps"`    // with pulses at /dev/pps0
}

var receiverForm = regexp.MustCompile(`^tty(S|USB|ACM|AMA)[0-9]{1,2}$`)

// environment is what the units of gpsd and chrony read: which device, and which configuration goes with it.
func (r Receiver) environment() string {
	kind := "nmea"
	if r.PPS {
		kind = "pps"
	}
	return fmt.Sprintf("RECEIVER=/dev/%s\nCHRONY=/etc/chrony/chrony-%s.conf\n", r.Device, kind)
}

// Recovery is who gets a part of the data volume's second key, shown at the console of the first start. Without holders
// there is none, and a TPM or a mainboard that fails takes the data with it.
type Recovery struct {
	Holders   []string `json:"holders"`
	Threshold int      `json:"threshold"`
}

// Network is the address of the one network interface. Without an address it is asked for by DHCP.
type Network struct {
	Interface string   `json:"interface"` // name or pattern; "" is every Ethernet interface
	Address   string   `json:"address"`   // with prefix length, 192.0.2.10/24
	Gateway   string   `json:"gateway"`
	DNS       []string `json:"dns"`
}

// A fieldError is what is wrong with one answer.
type fieldError struct {
	field string
	err   error
}

func (e fieldError) Error() string { return e.field + ": " + e.err.Error() }

// maxAnswers bounds either file on the answer disk.
const maxAnswers = 256 << 10

// parseAnswers reads answers.json. Unknown members are errors, and everything that is wrong is told at once.
func parseAnswers(text []byte) (Answers, error) {
	a := Answers{Seal: sealTPM}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		var kind *json.UnmarshalTypeError
		if errors.As(err, &kind) {
			return a, fieldError{kind.Field, fmt.Errorf("应为 %s (of another type than %s)", kind.Type, kind.Type)}
		}
		return a, fmt.Errorf("不是应答文件 (not a file of answers): %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return a, errors.New("应答之后还有内容 (something follows the answers)")
	}
	return a, a.check()
}

func (a *Answers) check() error {
	var faults []error
	say := func(field, what string) { faults = append(faults, fieldError{field, errors.New(what)}) }
	printable := func(s string) bool {
		return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
	}
	if strings.Contains(a.Disk, "/") || !printable(a.Disk) || len(a.Disk) > 128 {
		say("disk", "应为磁盘名（如 sda）或序列号 (want a kernel name such as sda, or a serial number)")
	}
	if a.Wipe != "" && !wipeForm.MatchString(a.Wipe) {
		say("wipe", "应为拒绝时显示的擦除码 (want the token that the refusal showed)")
	}
	if a.Wipe != "" && a.Disk == "" {
		say("wipe", "只能与 disk 一起使用 (needs disk)")
	}
	if a.Seal != sealTPM && a.Seal != sealPassphrase {
		say("seal", "应为 tpm2 或 passphrase (want tpm2 or passphrase)")
	}
	if len(a.Recovery.Holders) == 0 {
		if a.Recovery.Threshold != 0 {
			say("recovery.threshold", "没有持有人 (there are no holders)")
		}
	} else {
		if err := custody.CheckUnlock(a.Recovery.Holders, a.Recovery.Threshold); err != nil {
			faults = append(faults, fieldError{"recovery", err})
		}
	}
	a.Network.check(say)
	if a.Receiver.Device != "" && !receiverForm.MatchString(a.Receiver.Device) {
		say("receiver.device", "应为 ttyS0、ttyUSB0 之类 (want a serial device such as ttyS0 or ttyUSB0)")
	}
	if a.Receiver.PPS && a.Receiver.Device == "" {
		say("receiver.pps", "只能与 device 一起使用 (needs device)")
	}
	return errors.Join(faults...)
}

func (n *Network) check(say func(field, what string)) {
	if strings.ContainsFunc(n.Interface, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '*' || r == '.' || r == '-' || r == '_')
	}) || len(n.Interface) > 15 {
		say("network.interface", "不是网卡名 (not the name of an interface)")
	}
	if n.Address == "" {
		if n.Gateway != "" {
			say("network.gateway", "没有 address，即用 DHCP (there is no address: DHCP gives both)")
		}
	} else if prefix, err := netip.ParsePrefix(n.Address); err != nil || prefix.Addr().IsUnspecified() || prefix.Addr().IsMulticast() || prefix.Addr().IsLoopback() || prefix.Bits() == 0 {
		say("network.address", "应为带前缀长度的地址，如 192.0.2.10/24 (want an address with its prefix length)")
	} else if n.Gateway != "" {
		if g, err := netip.ParseAddr(n.Gateway); err != nil || g == prefix.Addr() || !prefix.Masked().Contains(g) {
			say("network.gateway", "应为同一网段中的另一地址 (want another address of the same network)")
		}
	}
	// With DHCP, too: nothing else names them, since what DHCP says of name servers is not taken.
	for _, dns := range n.DNS {
		if d, err := netip.ParseAddr(dns); err != nil || d.IsUnspecified() {
			say("network.dns", "不是地址 (not an address): "+dns)
		}
	}
	if len(n.DNS) > 3 || len(slices.Compact(slices.Sorted(slices.Values(n.DNS)))) != len(n.DNS) {
		say("network.dns", "至多三个，不得重复 (three at most, each once)")
	}
}

// reachable refuses answers for the appliance, TOML, with which a machine that nobody can log in to at its console would
// answer nobody. Whether they are right otherwise is not looked at.
func reachable(text []byte) error {
	var a struct {
		Restore        string         `toml:"restore"`
		Listen         string         `toml:"listen"`
		Admin          string         `toml:"admin"`
		PINSource      string         `toml:"pin_source"`
		Administrators map[string]any `toml:"administrators"`
		// The settings have the last word (docs/states.md).
		Settings struct {
			Listen struct {
				API   *string `toml:"api"`
				Admin *string `toml:"admin"`
			} `toml:"listen"`
			HSM struct {
				PINSource *string `toml:"pin_source"`
			} `toml:"hsm"`
			Admin struct {
				Local *string `toml:"local"`
			} `toml:"admin"`
		} `toml:"settings"`
	}
	if err := toml.Unmarshal(text, &a); err != nil {
		return err
	}
	var faults []error
	say := func(field, what string) { faults = append(faults, fieldError{field, errors.New(what)}) }
	type answer struct{ field, value string }
	outside := func(l answer) {
		host, port, err := net.SplitHostPort(l.value)
		if ip, _ := netip.ParseAddr(host); err != nil || port == "" || port == "0" || ip.IsLoopback() || host == "localhost" {
			say(l.field, "须写明外面能连到的地址与端口，如 0.0.0.0:8443 (want an address and a port that can be reached from outside)")
		}
	}
	if a.Restore != "" { // everything else comes out of the backup, and is looked at when it has come
		outside(answer{"restore", a.Restore})
		return errors.Join(faults...)
	}
	last := func(given answer, key string, setting *string) answer {
		if setting != nil {
			return answer{"settings." + key, *setting}
		}
		return given
	}
	for _, l := range []answer{last(answer{"listen", a.Listen}, "listen.api", a.Settings.Listen.API), last(answer{"admin", a.Admin}, "listen.admin", a.Settings.Listen.Admin)} {
		outside(l)
	}
	if len(a.Administrators) == 0 {
		say("administrators", "须写明三员：没有别的办法登录 (the three administrators are missing, and nobody else can log in)")
	}
	if local := a.Settings.Admin.Local; local != nil && *local != "login" {
		say("settings.admin.local", "只能是 login：三员须登录 (only login: the administrators log in)")
	}
	if pins := last(answer{"pin_source", a.PINSource}, "hsm.pin_source", a.Settings.HSM.PINSource); pins.value != "" && pins.value != "file" {
		say(pins.field, "封闭镜像上只能是 file：数据卷已封存，控制台不输入口令 (only file: the volume is sealed, and no PIN is typed at the console)")
	}
	return errors.Join(faults...)
}

// resolver is the machine's resolv.conf(5): the name servers of the answers, and nothing that a network says.
func (n Network) resolver() string {
	var b strings.Builder
	for _, dns := range n.DNS {
		fmt.Fprintf(&b, "nameserver %s\n", dns)
	}
	return b.String()
}

// file is n for systemd-networkd, which takes the first file that matches and nothing of /etc's 50-wired.network: what that refuses of
// a network, this refuses, too. A machine has a link-local address only where the site has given it one of IPv6.
func (n *Network) file() string {
	match, linkLocal := "en* eth*", "no"
	if n.Interface != "" {
		match = n.Interface
	}
	if prefix, err := netip.ParsePrefix(n.Address); err == nil && prefix.Addr().Is6() {
		linkLocal = "ipv6"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "[Match]\nName=%s\n\n[Network]\nLinkLocalAddressing=%s\nIPv6AcceptRA=no\nLLMNR=no\nMulticastDNS=no\nLLDP=no\n", match, linkLocal)
	if n.Address == "" {
		b.WriteString("DHCP=ipv4\n\n[DHCPv4]\nUseDNS=no\nUseNTP=no\nUseHostname=no\nUseDomains=no\nUseRoutes=no\nUseGateway=yes\n")
		return b.String()
	}
	fmt.Fprintf(&b, "Address=%s\n", n.Address)
	if n.Gateway != "" {
		fmt.Fprintf(&b, "Gateway=%s\n", n.Gateway)
	}
	for _, dns := range n.DNS {
		fmt.Fprintf(&b, "DNS=%s\n", dns)
	}
	return b.String()
}
