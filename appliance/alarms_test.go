package appliance

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/account"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/ntp"
	"yinjian/tsa/stamping"
)

// rings tells what a tracker makes of conditions that come one a second.
func rings(steps ...[]alarm.Condition) string {
	tr := alarm.Tracker{}
	var out []string
	for at, found := range steps {
		for _, e := range tr.Look(time.Duration(at)*time.Second, found) {
			out = append(out, fmt.Sprintf("%s %s %s %s", e.Event, e.Code, e.Object, e.Severity))
		}
	}
	return strings.Join(out, "; ")
}

func TestCertificateDue(t *testing.T) {
	t.Parallel()
	a := &Appliance{cfg: &Config{}}
	a.cfg.Alarms.CertificateDays = 30
	l := &alarms{a: a}
	end := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	with := func(lines ...account.CertificateLine) []alarm.Condition {
		a.soon.Store(&lines)
		return l.ofTrust(ntp.Reading{}) // of lists nothing is said without a time
	}
	line := func(use, owner string, days int) account.CertificateLine {
		return account.CertificateLine{Use: use, Owner: owner, Algorithm: "SM2", DaysLeft: days, NotAfter: &end}
	}
	got := rings(with(line(account.UseTSA, "tsa:sm2", 40)), with(line(account.UseTSA, "tsa:sm2", 29), line(account.UseStaff, "signer:D1", 5), line(account.UseStaff, "signer:D2", 6)),
		with(line(account.UseTSA, "tsa:sm2", 6)), with())
	if want := "raised certificate-due signers warning; raised certificate-due tsa:sm2/SM2 warning; " +
		"cleared certificate-due signers warning; raised certificate-due tsa:sm2/SM2 severe; cleared certificate-due tsa:sm2/SM2 severe"; !sameEvents(got, want) {
		t.Errorf("%s, want %s", got, want)
	}
}

// sameEvents compares what was told, whatever the order within one look.
func sameEvents(a, b string) bool {
	count := map[string]int{}
	for _, e := range strings.Split(a, "; ") {
		count[e]++
	}
	for _, e := range strings.Split(b, "; ") {
		count[e]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}

func TestBackupOverdue(t *testing.T) {
	t.Parallel()
	a := &Appliance{cfg: &Config{}}
	a.cfg.Alarms.BackupMaxAge = Duration(8 * 24 * time.Hour)
	a.backups = &backups{}
	born := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	l := &alarms{a: a, born: born}
	at := func(days int, state ntp.State) []alarm.Condition {
		return l.ofBackups(ntp.Reading{State: state, Time: born.AddDate(0, 0, days), Bound: time.Millisecond})
	}
	steps := [][]alarm.Condition{at(7, ntp.Trusted), at(9, ntp.Untrusted), at(9, ntp.Trusted)}
	a.backups.last = &backup.Statement{At: audit.Time{Micros: born.AddDate(0, 0, 9).UnixMicro()}}
	steps = append(steps, at(9, ntp.Trusted), at(16, ntp.Trusted), at(18, ntp.Trusted))
	if got, want := rings(steps...), "raised backup-overdue  warning; cleared backup-overdue  warning; raised backup-overdue  warning"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

type fixedClock struct{ ntp.Reading }

func (c *fixedClock) Now() ntp.Reading { return c.Reading }

// A serviceWorker carries requests to a service as a worker's process does.
type serviceWorker struct{ *stamping.Service }

func (w serviceWorker) Extend(ctx context.Context, request func() ([]byte, error)) ([]byte, error) {
	b, err := request()
	if err != nil {
		return nil, err
	}
	return w.Service.Extend(ctx, b)
}

func TestTimeWorkerAlarm(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	own := &fixedClock{ntp.Reading{State: ntp.Trusted, Time: now, Bound: time.Millisecond}}
	theirs := &fixedClock{own.Reading}
	a := &Appliance{watch: stamping.NewWatch(own)}
	l := &alarms{a: a}
	log := logrus.New()
	log.SetOutput(t.Output())
	worker := serviceWorker{stamping.New(nil, theirs, nil, log)}
	look := func() []alarm.Condition {
		if err := a.watch.Look(t.Context(), "b", worker); err != nil {
			t.Fatal(err)
		}
		return l.ofWorkers(own.Now())
	}
	steps := [][]alarm.Condition{look()}
	theirs.Time = now.Add(time.Second)
	steps = append(steps, look())
	theirs.Time = now
	steps = append(steps, look())
	if got, want := rings(steps...), "raised time-worker b warning; cleared time-worker b warning"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	own.State, theirs.Time = ntp.Untrusted, now.Add(time.Second)
	if found := look(); len(found) > 0 {
		t.Errorf("without an own time a worker's is called wrong: %v", found)
	}
}
