package appliance

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/assess"
	"yinjian/appliance/problem"
)

// A listening is a listener as the appliance declares it.
type listening struct {
	name, address string
	plain         bool
}

// declared are the listeners that the state names.
func (c *collection) declared() []listening {
	s, _ := health{c.a}.State().(state)
	var out []listening
	for _, name := range slices.Sorted(maps.Keys(s.Listeners)) {
		address, words, _ := strings.Cut(s.Listeners[name], " ")
		if _, _, err := net.SplitHostPort(address); err != nil {
			continue // a socket of this machine: nothing of it crosses a network
		}
		out = append(out, listening{name, address, !strings.Contains(words, "TLS")})
	}
	return out
}

func addresses(list []listening) map[string]string {
	out := map[string]string{}
	for _, l := range list {
		out[l.name] = l.address
	}
	return out
}

func samePort(a, b string) bool {
	_, p, err := net.SplitHostPort(a)
	_, q, qerr := net.SplitHostPort(b)
	return err == nil && qerr == nil && p == q
}

// A handshake is what was seen of one.
type handshake struct {
	Address  string   `json:"address"`
	Version  string   `json:"version"`
	Suite    string   `json:"suite"`
	Group    string   `json:"group"`
	Protocol string   `json:"alpn,omitempty"`
	Chain    [][]byte `json:"chain"` // DER
	Subjects []string `json:"subjects"`
	Asked    bool     `json:"client_certificate_asked"`
	// What went over the wire in the handshake, as it was.
	Sent     []byte `json:"sent"`
	Received []byte `json:"received"`
}

// channelDeadline bounds each try at a listener.
const channelDeadline = 10 * time.Second

// channels is section 7.
func (c *collection) channels() {
	for _, l := range c.declared() {
		item := line{
			id: "channels.listener." + l.name, title: "监听 " + l.name + " 的现场握手 (live handshake)", command: "openssl s_client -connect " + l.address,
			shows: "由 TLS 保护：版本、套件、证书链与握手的原始字节", limits: "从本机发起；不证明网络上别处的客户端用什么",
		}
		if l.plain {
			c.try(assess.SectionChannels, item, func() (any, error) {
				return map[string]string{"address": l.address}, errors.New("红色：明文监听 (RED: a plaintext listener)")
			})
			continue
		}
		c.try(assess.SectionChannels, item, func() (any, error) {
			h, err := c.shake(l.address, &tls.Config{MinVersion: tls.VersionTLS10})
			if err != nil {
				return h, err
			}
			if l.name == "api" {
				if own := c.a.listener.certificate.Load(); own == nil || !bytes.Equal(own.Certificate[0], h.Chain[0]) {
					return h, errors.New("应答的证书不是本机监听所用的 (the certificate is not this listener's)")
				}
			}
			return h, nil
		})
		c.try(assess.SectionChannels, line{
			id: "channels.refused." + l.name, title: "监听 " + l.name + " 拒绝的版本与套件 (versions and suites refused)", command: "openssl s_client -connect " + l.address + " -tls1_1",
			shows: "停用的版本、套件与明文逐一试过，均被拒绝", limits: "只试 crypto/tls 能提出的套件；SSL 2、3 没有试",
		}, func() (any, error) { return c.refuses(l) })
	}
	c.absent(assess.SectionChannels, line{id: "channels.tlcp", title: "TLCP（GB/T 38636-2020）"}, "没有构建 TLCP，信道用国际算法的 TLS (not built: the channels are TLS with international algorithms)")
	c.absent(assess.SectionChannels, line{id: "channels.capture", title: "抓包文件 (packet capture)"}, "没有抓包：握手的原始字节见各监听，完整抓包须由测评人员在网络上做 (none was made: handshakes' bytes stand with each listener)")
}

// A recorder keeps what goes over a connection, up to recorded bytes each way.
type recorder struct {
	net.Conn
	sent, received bytes.Buffer
}

const recorded = 16 << 10

func (r *recorder) Write(b []byte) (int, error) {
	r.sent.Write(b[:min(len(b), recorded-min(recorded, r.sent.Len()))])
	return r.Conn.Write(b)
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.received.Write(b[:min(n, recorded-min(recorded, r.received.Len()))])
	return n, err
}

// reach connects to a listener of this machine.
func (c *collection) reach(address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
		if ip.Is6() {
			host = "::1"
		}
	}
	d := net.Dialer{Timeout: channelDeadline}
	conn, err := d.DialContext(c.ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, missing("连不上 (cannot be reached): " + err.Error())
	}
	return conn, conn.SetDeadline(time.Now().Add(channelDeadline)) // interval
}

// shake makes one handshake. The chain is recorded and not judged: section 5 does that.
func (c *collection) shake(address string, cfg *tls.Config) (*handshake, error) {
	conn, err := c.reach(address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	h := &handshake{Address: address}
	cfg.InsecureSkipVerify = true // what answers is to be seen, whatever it is
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		h.Asked = true
		return new(tls.Certificate), nil
	}
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		for _, cert := range s.PeerCertificates {
			h.Chain, h.Subjects = append(h.Chain, cert.Raw), append(h.Subjects, subjectOf(cert.Raw))
		}
		return nil
	}
	record := &recorder{Conn: conn}
	t := tls.Client(record, cfg)
	ctx, cancel := context.WithTimeout(c.ctx, channelDeadline)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		return h, err
	}
	s := t.ConnectionState()
	h.Version, h.Suite, h.Group, h.Protocol = tls.VersionName(s.Version), tls.CipherSuiteName(s.CipherSuite), s.CurveID.String(), s.NegotiatedProtocol
	h.Sent, h.Received = record.sent.Bytes(), record.received.Bytes()
	return h, nil
}

func subjectOf(der []byte) string {
	cert, err := smx509.ParseCertificate(der)
	if err != nil {
		return hex.EncodeToString(der[:min(len(der), 16)])
	}
	return cert.Subject.String()
}

// A refusal is one try that had to be refused.
type refusal struct {
	Tried   string `json:"tried"`
	Refused bool   `json:"refused"`
	Answer  string `json:"answer"`
}

// refuses tries what must be refused: versions that are off, suites of TLS 1.2 that are not ECDHE with AEAD, no TLS at all.
func (c *collection) refuses(l listening) (any, error) {
	tls12 := l.name == "api" && c.a.cfg.Listen.TLS12
	out := []refusal{}
	try := func(what string, cfg *tls.Config) error {
		h, err := c.shake(l.address, cfg)
		var alert *net.OpError
		var none missing
		switch {
		case errors.As(err, &none):
			return err
		case err == nil:
			out = append(out, refusal{what, false, h.Version + " " + h.Suite})
		case errors.As(err, &alert) && alert.Op == "remote error":
			out = append(out, refusal{what, true, err.Error()})
		default:
			return missing(what + "：" + err.Error())
		}
		return nil
	}
	for _, version := range []uint16{tls.VersionTLS10, tls.VersionTLS11, tls.VersionTLS12} {
		if version == tls.VersionTLS12 && tls12 {
			continue
		}
		if err := try(tls.VersionName(version), &tls.Config{MinVersion: version, MaxVersion: version}); err != nil {
			return out, err
		}
	}
	for _, suite := range slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()) {
		if !slices.Contains(suite.SupportedVersions, tls.VersionTLS12) || tls12 && strings.Contains(suite.Name, "ECDHE") && !strings.Contains(suite.Name, "_CBC_") && !strings.Contains(suite.Name, "RC4") {
			continue
		}
		if err := try(suite.Name, &tls.Config{MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{suite.ID}}); err != nil {
			return out, err
		}
	}
	conn, err := c.reach(l.address)
	if err != nil {
		return out, err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET /health/alive HTTP/1.0\r\n\r\n")); err != nil {
		return out, missing(err.Error())
	}
	answer, _ := bufio.NewReader(conn).ReadString('\n') // a connection that ends is a refusal
	out = append(out, refusal{"明文 HTTP (plain HTTP)", !strings.HasPrefix(answer, "HTTP/1.") || strings.Contains(answer, " 400 "), strings.TrimSpace(answer)})
	for _, r := range out {
		if !r.Refused {
			return out, fmt.Errorf("没有拒绝 (not refused): %s", r.Tried)
		}
	}
	return out, nil
}

// listeningPorts are the TCP addresses that this process listens on, as the kernel says.
func listeningPorts() ([]string, error) {
	inodes := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if err != nil {
			continue // it was closed meanwhile
		}
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	out := []string{}
	for _, name := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		table, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for row := range strings.SplitSeq(string(table), "\n") {
			f := strings.Fields(row)
			if len(f) < 10 || f[3] != "0A" || !inodes[f[9]] { // TCP_LISTEN
				continue
			}
			address, err := kernelAddress(f[1])
			if err != nil {
				return nil, err
			}
			out = append(out, address)
		}
	}
	slices.Sort(out)
	return out, nil
}

// kernelAddress reads "0100007F:1F90": words in the machine's order (proc(5)); the machines that we build for are little-endian.
func kernelAddress(text string) (string, error) {
	host, port, _ := strings.Cut(text, ":")
	words, err := hex.DecodeString(host)
	n, perr := strconv.ParseUint(port, 16, 16)
	if err != nil || perr != nil || len(words) != 4 && len(words) != 16 {
		return "", fmt.Errorf("%q is no address of the kernel's", text)
	}
	for i := 0; i < len(words); i += 4 {
		binary.BigEndian.PutUint32(words[i:], binary.LittleEndian.Uint32(words[i:]))
	}
	ip, _ := netip.AddrFromSlice(words)
	return netip.AddrPortFrom(ip, uint16(n)).String(), nil
}

// shownProblem is an error in words that may be shown.
func shownProblem(err error) string {
	var p *problem.Problem
	if errors.As(err, &p) {
		return p.Detail
	}
	return cutText(err.Error())
}
