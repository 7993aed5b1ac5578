package dm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

// A Config says where the database is.
type Config struct {
	User     string
	Hosts    []string // host:port
	Topology Topology
	// TLSCA is a PEM file: connections are TLS to a terminator at the server (stunnel), verified against it. The driver's
	// own TLS does not verify whom it speaks to, and is not used. Empty: plain.
	TLSCA string
	// TLSName is the name in the terminator's certificate; empty: the host.
	TLSName string
	// Now is the time for certificates; nil: the system's.
	Now func() time.Time
}

// A Topology is how several servers are one database.
type Topology string

// Topologies.
const (
	Single  Topology = "single"  // one server
	Standby Topology = "standby" // primary and standbys (数据守护): whichever is primary
	DSC     Topology = "dsc"     // instances on one storage
)

const (
	defaultPort = "5236"
	dialTimeout = 5 * time.Second
	// silence is how long a server may not answer. The driver has no deadline of its own, and none at all for a commit.
	silence = 30 * time.Second
)

var (
	reUser = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]{0,63}$`)
	// What the driver does with other characters changed between its versions: some decode percent signs, some do not.
	rePassword = regexp.MustCompile(`^[A-Za-z0-9_.~-]{8,64}$`)
	reHost     = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)
)

func unfit(format string, args ...any) error {
	return fmt.Errorf("%w: DSN: %s", dbdriver.ErrUnfit, fmt.Sprintf(format, args...))
}

// ParseDSN reads
//
//	dm://user@host[:port][,host[:port]…][?topology=single|standby|dsc][&tls_ca=FILE][&tls_name=NAME]
//
// which is ours, not the driver's: what it takes differs between its versions, and much of it must not be set. The
// tables are in the user's own schema.
func ParseDSN(dsn string) (*Config, error) {
	rest, ok := strings.CutPrefix(dsn, "dm://")
	if !ok {
		return nil, unfit("须以 dm:// 开头 (must begin with dm://)")
	}
	rest, query, _ := strings.Cut(rest, "?")
	user, hosts, ok := strings.Cut(rest, "@")
	if strings.Contains(user, ":") {
		return nil, unfit("不得写口令，请用 password_file (the password belongs into a file)")
	}
	if !ok || !reUser.MatchString(user) {
		return nil, unfit("用户名须为字母开头的字母、数字、下划线 (the user is missing or has other characters)")
	}
	c := &Config{User: user, Topology: Single}
	for h := range strings.SplitSeq(hosts, ",") {
		host, port, err := net.SplitHostPort(h)
		if err != nil {
			host, port = strings.Trim(h, "[]"), defaultPort
		}
		if net.ParseIP(host) == nil && !reHost.MatchString(host) || !rePort.MatchString(port) {
			return nil, unfit("%q 不是主机名或 主机:端口 (is no host:port)", h)
		}
		c.Hosts = append(c.Hosts, net.JoinHostPort(host, port))
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, unfit("参数 %q (parameters)", query)
	}
	for key, v := range values {
		if len(v) != 1 || v[0] == "" {
			return nil, unfit("参数 %s 须恰好一个值 (one value is wanted)", key)
		}
		switch key {
		case "topology":
			c.Topology = Topology(v[0])
		case "tls_ca":
			c.TLSCA = v[0]
		case "tls_name":
			c.TLSName = v[0]
		default:
			return nil, unfit("未知的参数 %s (unknown parameter)", key)
		}
	}
	switch several := len(c.Hosts) > 1; {
	case c.Topology != Single && c.Topology != Standby && c.Topology != DSC:
		return nil, unfit("topology 须为 single、standby 或 dsc")
	case several && c.Topology == Single:
		return nil, unfit("多个主机须写明 topology=standby 或 dsc (several hosts need one)")
	case !several && c.Topology == DSC:
		return nil, unfit("topology=dsc 须有多个主机 (needs several hosts)")
	case c.TLSName != "" && c.TLSCA == "":
		return nil, unfit("tls_name 须与 tls_ca 同用 (needs tls_ca)")
	}
	return c, nil
}

var rePort = regexp.MustCompile(`^[1-9][0-9]{0,4}$`)

// group is the name under which the driver gets several hosts.
const group = "YINJIAN"

// driverDSN is the driver's form. Every key that it is given is needed:
//
//   - loginMode: with a standby about, only a primary will do; 1 against a single server fails, so that has the default.
//   - socketTimeout: seconds, of dialling; without it one dead node blocks all connections for the system's timeout.
//   - switchTimes: one round over the hosts; whoever ships tries again himself.
//   - LobMode 2: a LOB comes with its row, and can be read after the next one.
//   - dialName: our dial hook.
//
// Not given: rwSeparate (a read could miss what was just written), logDir (logs hold values), the driver's TLS.
func (c *Config) driverDSN(password, dialName string) (string, error) {
	if !rePassword.MatchString(password) {
		return "", fmt.Errorf("%w: DM 口令须为 8–64 位字母、数字或 _ . ~ - (letters, digits, _ . ~ - only: the driver's versions differ over others)", dbdriver.ErrUnfit)
	}
	var keys []string
	add := func(key, value string) { keys = append(keys, key+"="+value) }
	at := c.Hosts[0]
	if len(c.Hosts) > 1 {
		at = group
		add(group, "("+strings.Join(c.Hosts, ",")+")")
	}
	if c.Topology == Standby {
		add("loginMode", "1")
	} else {
		add("loginMode", "4")
	}
	if c.Topology == DSC {
		add("cluster", "DSC")
	}
	add("switchTimes", "1")
	add("switchInterval", "200")
	add("socketTimeout", fmt.Sprint(int(dialTimeout.Seconds())))
	add("LobMode", "2")
	add("appName", "yinjian")
	add("dialName", dialName)
	return "dm://" + c.User + ":" + password + "@" + at + "?" + strings.Join(keys, "&"), nil
}

// way says how the server is reached, for the report.
func (c *Config) way() central.Setting {
	s := central.Setting{Name: "transport", Value: "TLS", Verdict: central.Fit}
	if c.TLSCA == "" {
		s.Value, s.Verdict = "plain", central.Doubtful
		s.Why = "未加密：驱动自带的 TLS 不核验服务器，未采用；请用 tls_ca 与服务器旁的 TLS 终结器 (not encrypted: the driver's TLS verifies nobody and is not used)"
	}
	return s
}

// dialer is the dial hook: it reaches the configured hosts alone, within a time, verified if TLSCA is there, and its
// connections do not wait for ever.
func (c *Config) dialer(silence time.Duration) (DialFunc, error) {
	var roots *x509.CertPool
	if c.TLSCA != "" {
		pem, err := os.ReadFile(c.TLSCA)
		if err != nil {
			return nil, fmt.Errorf("%w: tls_ca: %v", dbdriver.ErrUnfit, err)
		}
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: tls_ca: %s 中没有证书 (has no certificate)", dbdriver.ErrUnfit, c.TLSCA)
		}
	}
	return func(ctx context.Context, addr string) (net.Conn, error) {
		if !slices.Contains(c.Hosts, addr) {
			return nil, fmt.Errorf("dm: %s is not a configured host", addr)
		}
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		if roots == nil {
			return bounded{conn, silence}, nil
		}
		name := c.TLSName
		if name == "" {
			name, _, _ = net.SplitHostPort(addr)
		}
		secure := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: name, MinVersion: tls.VersionTLS12, Time: c.Now})
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, fmt.Errorf("dm: TLS to %s: %w", addr, err)
		}
		return bounded{secure, silence}, nil
	}, nil
}

// bounded is a connection whose every read and write ends within a time.
type bounded struct {
	net.Conn
	limit time.Duration
}

func (b bounded) Read(p []byte) (int, error) {
	if err := b.SetReadDeadline(time.Now().Add(b.limit)); err != nil { // interval
		return 0, err
	}
	return b.Conn.Read(p)
}

func (b bounded) Write(p []byte) (int, error) {
	if err := b.SetWriteDeadline(time.Now().Add(b.limit)); err != nil { // interval
		return 0, err
	}
	return b.Conn.Write(p)
}
