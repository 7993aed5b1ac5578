package appliance

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	"yinjian/api/notify"
)

// Alarms says when an alarm is raised, and who is told.
type Alarms struct {
	// 异常持续多久才报警，1s–10m，见 [alarms.md](alarms.md) (how long something must be wrong)
	// 缺省：`5s`
	RaiseAfter Duration `toml:"raise_after"`
	// 消失多久才算恢复，1s–1h (how long it must be right again)
	// 缺省：`1m`
	ClearAfter Duration `toml:"clear_after"`
	// 中心库落后多少条即报警 (entries that the central database lags)
	// 缺省：`10000`
	Lag int `toml:"lag"`
	// 距上次备份（从未备份则距启用）多久即报警，1h–8784h (age of the last backup)
	// 缺省：`192h`
	BackupMaxAge Duration `toml:"backup_max_age"`
	// 证书到期前多少天报警，1–90 (days before a certificate ends)
	// 缺省：`30`
	CertificateDays int            `toml:"certificate_days"`
	Syslog          []AlarmSyslog  `toml:"syslog,omitempty"`
	Webhook         []AlarmWebhook `toml:"webhook,omitempty"`
}

// An AlarmSyslog is a receiver of syslog (RFC 5424).
type AlarmSyslog struct {
	// syslog 接收方 `tls://主机:端口`（RFC 5425）；`tcp://`、`udp://` 须 `insecure = true` (a receiver of syslog)
	// 缺省：必填
	Address string `toml:"address"`
	// 接收方证书的 CA，PEM (CAs of the receiver)
	// 缺省：系统的 the system's
	Roots string `toml:"roots"`
	// 接收方证书中的名称 (its name in the certificate)
	// 缺省：地址中的主机 the address's host
	ServerName string `toml:"server_name"`
	// 接收方要求客户端证书时，本机的证书，PEM；与 `key_file` 同时给出 (ours, where it asks for one)
	// 缺省：无
	Certificate string `toml:"certificate"`
	// 该证书的私钥，权限 600 (its private key)
	// 缺省：无
	KeyFile string `toml:"key_file"`
	// 允许 `tcp://`、`udp://` 明文 (in the clear)
	// 缺省：`false`
	Insecure bool `toml:"insecure"`
}

// An AlarmWebhook is a receiver of HTTP POST requests.
type AlarmWebhook struct {
	// webhook 的 https 地址 (where alarms are posted)
	// 缺省：必填
	URL string `toml:"url"`
	// HMAC-SM3 密钥文件，一行，至少 16 字节，权限 600 (key of the HMAC)
	// 缺省：必填
	KeyFile string `toml:"key_file"`
	// 接收方证书的 CA，PEM (CAs of the receiver)
	// 缺省：系统的 the system's
	Roots string `toml:"roots"`
	// 允许 `http://` 明文 (in the clear)
	// 缺省：`false`
	Insecure bool `toml:"insecure"`
}

func (c *Alarms) setDefaults(dir string) {
	def(&c.RaiseAfter, Duration(5*time.Second))
	def(&c.ClearAfter, Duration(time.Minute))
	def(&c.Lag, 10_000)
	def(&c.BackupMaxAge, Duration(8*24*time.Hour))
	def(&c.CertificateDays, 30)
	for i := range c.Syslog {
		s := &c.Syslog[i]
		abs(dir, &s.Roots)
		abs(dir, &s.Certificate)
		abs(dir, &s.KeyFile)
	}
	for i := range c.Webhook {
		abs(dir, &c.Webhook[i].KeyFile)
		abs(dir, &c.Webhook[i].Roots)
	}
}

func (c *Alarms) validate(bad func(key, format string, args ...any)) {
	within := func(key string, d Duration, least, most time.Duration) {
		if time.Duration(d) < least || time.Duration(d) > most {
			bad("alarms."+key, "须在 %v 与 %v 之间 (between these)", least, most)
		}
	}
	within("raise_after", c.RaiseAfter, time.Second, 10*time.Minute)
	within("clear_after", c.ClearAfter, time.Second, time.Hour)
	within("backup_max_age", c.BackupMaxAge, time.Hour, 366*24*time.Hour)
	if c.Lag < 1 {
		bad("alarms.lag", "至少为 1 (at least 1)")
	}
	if c.CertificateDays < 1 || c.CertificateDays > 90 {
		bad("alarms.certificate_days", "须为 1–90 (1 to 90)")
	}
	if len(c.Syslog)+len(c.Webhook) > 8 {
		bad("alarms", "接收方至多 8 个 (at most 8 receivers)")
	}
	for i, s := range c.Syslog {
		at := fmt.Sprintf("alarms.syslog[%d].", i)
		if err := (&notify.Syslog{Address: s.Address, Insecure: s.Insecure}).Check(); err != nil {
			bad(at+"address", "%v", err)
		}
		if (s.Certificate == "") != (s.KeyFile == "") {
			bad(at+"certificate", "certificate 与 key_file 须同时给出 (give both or neither)")
		}
	}
	for i, w := range c.Webhook {
		at := fmt.Sprintf("alarms.webhook[%d].", i)
		if err := (&notify.Webhook{URL: w.URL, Insecure: w.Insecure}).Check(); err != nil {
			bad(at+"url", "%v", err)
		}
		if w.KeyFile == "" {
			bad(at+"key_file", "缺少 (missing)")
		}
	}
}

// receivers opens what the configuration names. Nothing is sent yet.
func (a *Appliance) receivers() ([]*notify.Receiver, error) {
	now := func() time.Time { return apiClock{a}.Now().Time }
	roots := func(key, name string) (*x509.CertPool, error) {
		if name == "" {
			return nil, nil
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("%s: %s: 没有可用的证书 (no certificate that TLS can use)", key, name)
		}
		return pool, nil
	}
	var out []*notify.Receiver
	for i, s := range a.cfg.Alarms.Syslog {
		at := fmt.Sprintf("alarms.syslog[%d].", i)
		pool, err := roots(at+"roots", s.Roots)
		if err != nil {
			return nil, err
		}
		t := notify.TLS{Roots: pool, ServerName: s.ServerName, Now: now}
		if s.Certificate != "" {
			if _, err := ReadSecret(s.KeyFile); err != nil { // for its permissions
				return nil, fmt.Errorf("%skey_file: %w", at, err)
			}
			pair, err := tls.LoadX509KeyPair(s.Certificate, s.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("%scertificate: %w", at, err)
			}
			t.Certificate = &pair
		}
		r, err := notify.NewSyslog(notify.Syslog{Address: s.Address, Insecure: s.Insecure, TLS: t}, a.log)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	for i, w := range a.cfg.Alarms.Webhook {
		at := fmt.Sprintf("alarms.webhook[%d].", i)
		pool, err := roots(at+"roots", w.Roots)
		if err != nil {
			return nil, err
		}
		secret, err := ReadSecret(w.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("%skey_file: %w", at, err)
		}
		r, err := notify.NewWebhook(notify.Webhook{URL: w.URL, Insecure: w.Insecure, Key: secret, TLS: notify.TLS{Roots: pool, Now: now}}, a.log)
		if err != nil {
			return nil, fmt.Errorf("%skey_file: %w", at, err)
		}
		out = append(out, r)
	}
	return out, nil
}
