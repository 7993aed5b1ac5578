package appliance

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/account"
)

// TestExpiry is about what people are told of certificates that end, and when.
func TestExpiry(t *testing.T) {
	t.Parallel()
	for days, want := range map[int]int{91: 0, 90: 0, 89: 90, 30: 90, 29: 30, 7: 30, 6: 7, 1: 7, 0: 1, -1: 1, -400: 1} {
		if got := expiryOf(days); got != want {
			t.Errorf("expiryOf(%d) = %d, want %d", days, got, want)
		}
	}
	start := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	line := func(owner, algorithm, state string, days int) account.CertificateLine {
		l := account.CertificateLine{Owner: owner, Algorithm: algorithm, State: state, DaysLeft: days, Use: account.UseStaff}
		if !strings.HasPrefix(owner, "signer:") {
			l.Use = account.UseTSA
		}
		if state != account.StatePending {
			end := start.AddDate(0, 0, days)
			l.NotAfter = &end
		}
		return l
	}
	evaluation := line("signer:D003", "SM2", account.StateSuperseded, 700) // ends long after the real one
	evaluation.Evaluation = true
	soon := expiring([]account.CertificateLine{
		evaluation,
		line("signer:D002", "SM2", account.StateUnusable, 600), // of a CA that is trusted no more
		line("signer:D008", "SM2", account.StateUnusable, 60),  // its list is too old
		line("tsa:sm2", "SM2", account.StateActive, 20),
		line("tsa:rsa", "RSA-2048", account.StateActive, 20),
		line("tsa:rsa", "RSA-2048", account.StateNext, 400), // it has a successor
		line("signer:D001", "SM2", account.StateActive, 80),
		line("signer:D002", "SM2", account.StateActive, 3),
		line("signer:D003", "SM2", account.StateActive, 2),
		line("signer:D004", "SM2", account.StateExpired, -5),
		line("signer:D004", "RSA-2048", account.StateActive, 500),
		line("signer:D005", "SM2", account.StateSuperseded, 3),
		line("signer:D005", "SM2", account.StateActive, 300),
		line("signer:D006", "SM2", account.StateRevoked, 3),
		line("signer:D007", "SM2", account.StatePending, 0),
		line("signer:drill-0a1b2c3d", "SM2", account.StateActive, 0), // of a drill, and no longer than it
	})
	var got []string
	for _, l := range soon {
		got = append(got, l.Owner)
	}
	if want := "[signer:D004 signer:D003 signer:D002 tsa:sm2 signer:D008 signer:D001]"; fmt.Sprint(got) != want {
		t.Errorf("expiring %v, want %v", got, want)
	}
	warnings := expiryWarnings(soon)
	for i, words := range [][]string{
		{"tsa:sm2", "还有 20 天"}, {"1 张已到期", "D004", "已于 2026-11-17"}, {"2 张7 天内", "D003", "还有 2 天"}, {"2 张90 天内", "D008"},
	} {
		for _, w := range words {
			if len(warnings) != 4 || !strings.Contains(warnings[i], w) {
				t.Errorf("warning %d of %q does not say %q", i, warnings, w)
			}
		}
	}
	if w := expiryWarnings(nil); len(w) != 0 {
		t.Errorf("%q", w)
	}
	list := func(left, life time.Duration) account.CRLLine {
		return account.CRLLine{Issuer: fmt.Sprint(left), ThisUpdate: start.Add(left - life), NextUpdate: start.Add(left)}
	}
	own := list(-time.Hour, time.Hour)
	own.Own = true
	w := listWarnings([]account.CRLLine{list(-time.Hour, time.Hour), list(time.Hour, 24*time.Hour), list(3*time.Hour, 24*time.Hour), own}, start)
	if len(w) != 2 || !strings.Contains(w[0], "已过期") || !strings.Contains(w[1], "将于") {
		t.Errorf("%q", w)
	}
}
