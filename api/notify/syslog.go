package notify

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/alarm"
)

// Syslog is a receiver of syslog.
type Syslog struct {
	Address string // tls://host:port; with Insecure also tcp://host:port and udp://host:port
	// Insecure lets messages go in the clear, where anybody on the way reads, changes and forges them.
	Insecure bool
	TLS      TLS
}

// Check is nil for what [NewSyslog] takes.
func (s *Syslog) Check() error {
	_, _, err := s.place()
	return err
}

func (s *Syslog) place() (scheme, address string, err error) {
	u, err := url.Parse(s.Address)
	if err != nil {
		return "", "", errors.New("want tls://host:port")
	}
	if _, _, err := net.SplitHostPort(u.Host); err != nil || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return "", "", errors.New("want tls://host:port")
	}
	switch {
	case u.Scheme == "tls":
	case (u.Scheme == "tcp" || u.Scheme == "udp") && s.Insecure:
	case u.Scheme == "tcp" || u.Scheme == "udp":
		return "", "", errors.New("明文须写明 insecure = true (in the clear only with insecure = true)")
	default:
		return "", "", errors.New("want tls://host:port")
	}
	return u.Scheme, u.Host, nil
}

// NewSyslog makes a receiver. Messages are tried for ever: the queue's bound is what ends them.
func NewSyslog(s Syslog, log logrus.FieldLogger) (*Receiver, error) {
	scheme, address, err := s.place()
	if err != nil {
		return nil, fmt.Errorf("notify: syslog %s: %w", s.Address, err)
	}
	return newReceiver("syslog "+scheme+"://"+address, 0, &syslog{cfg: s, scheme: scheme, address: address}, log), nil
}

// syslog keeps one connection.
type syslog struct {
	cfg             Syslog
	scheme, address string

	conn net.Conn
	gone chan struct{} // closed when the other side has ended the connection
}

// noticeEnd is how long one looks, after a message, whether the other side ends the connection because of it: syslog has no
// acknowledgement (RFC 5425 §4.4 leaves that to TLS's close_notify).
const noticeEnd = 200 * time.Millisecond

func (s *syslog) send(ctx context.Context, m *Message, dropped uint64) error {
	if s.conn != nil {
		select {
		case <-s.gone:
			s.close()
		default:
		}
	}
	if s.conn == nil {
		if err := s.dial(ctx); err != nil {
			return fmt.Errorf("notify: syslog: %w", err)
		}
	}
	text := syslogMessage(m, dropped)
	if s.scheme != "udp" {
		text = append(fmt.Appendf(nil, "%d ", len(text)), text...) // RFC 5425 §4.3, RFC 6587 §3.4.1: octet counting
	}
	deadline, _ := ctx.Deadline()
	err := s.conn.SetWriteDeadline(deadline)
	if err == nil {
		_, err = s.conn.Write(text)
	}
	if err == nil && s.scheme != "udp" {
		select {
		case <-s.gone:
			err = errors.New("the receiver ended the connection")
		case <-time.After(noticeEnd):
		}
	}
	if err != nil {
		s.close()
		return fmt.Errorf("notify: syslog: %w", err)
	}
	return nil
}

func (s *syslog) dial(ctx context.Context) error {
	host, _, err := net.SplitHostPort(s.address)
	if err != nil {
		return err
	}
	network := "tcp"
	if s.scheme == "udp" {
		network = "udp"
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, s.address)
	if err != nil {
		return err
	}
	if s.scheme == "tls" {
		secure := tls.Client(conn, s.cfg.TLS.config(host))
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			return err
		}
		conn = secure
	}
	s.conn, s.gone = conn, make(chan struct{})
	if s.scheme == "udp" {
		return nil
	}
	go func(conn net.Conn, gone chan struct{}) { // ends with the connection
		_, _ = io.Copy(io.Discard, conn)
		close(gone)
	}(s.conn, s.gone)
	return nil
}

func (s *syslog) close() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

const (
	facilityLocal0 = 16
	// structured names our element. 32473 is the number that RFC 5612 keeps for documents: we have none of our own.
	structured     = "yinjian@32473"
	maxSyslogText  = 4096 // RFC 5425 §4.3.1: receivers should take 8192 in all
	maxSyslogValue = 256
)

// severityOf is RFC 5424 §6.2.1's.
func severityOf(e *alarm.Event) int {
	switch {
	case e.Event == alarm.Tested:
		return 6
	case e.Event == alarm.Cleared, e.Severity == alarm.Notice:
		return 5
	case e.Severity == alarm.Warning:
		return 4
	}
	return 2
}

// syslogMessage is a message in the form of RFC 5424 §6.
func syslogMessage(m *Message, dropped uint64) []byte {
	b := fmt.Appendf(nil, "<%d>1 %s %s yinjian %d alarm.%s [%s", facilityLocal0*8+severityOf(&m.Event), m.At.UTC().Format("2006-01-02T15:04:05.000000Z"),
		m.Node, os.Getpid(), m.Event.Event, structured)
	for _, p := range [][2]string{
		{"id", m.ID}, {"code", string(m.Code)}, {"object", m.Object}, {"severity", m.Severity.String()}, {"campus", m.Campus},
		{"time_trusted", fmt.Sprint(m.Trusted)}, {"dropped", fmt.Sprint(dropped)},
	} {
		b = fmt.Appendf(b, " %s=\"%s\"", p[0], structuredValue.Replace(cut(oneLine(p[1]), maxSyslogValue)))
	}
	text := m.Title
	if m.Detail != "" {
		text += "：" + m.Detail
	}
	if m.Next != "" && m.Event.Event == alarm.Raised {
		text += "。下一步 (next)：" + m.Next
	}
	b = append(b, "] \xef\xbb\xbf"...) // RFC 5424 §6.4: a text in UTF-8 begins with the byte order mark
	return append(b, cut(oneLine(text), maxSyslogText)...)
}

// structuredValue escapes a PARAM-VALUE (RFC 5424 §6.3.3).
var structuredValue = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`)

// oneLine keeps what an operator reads on one line.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
