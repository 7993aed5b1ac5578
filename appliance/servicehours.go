package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"syscall"
	"time"

	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
)

// kindServiceHour is the kind of an entry that says what an hour was like; its payload "hour" is a [ServiceHour].
const kindServiceHour = "service.hour"

// What [Filed] finds, by day.
const (
	FiledAlarms = "alarm"         // alarms, raised and over
	FiledHours  = kindServiceHour // [ServiceHour]
	FiledClock  = kindTimeLedger  // ledger.Hour
)

// Filed calls fn with the entries of a journal that are filed by day, from from to to and a day more at either end, in the
// order of the journal. It works on a copy, too.
func Filed(ctx context.Context, store audit.Store, what string, from, to time.Time, fn func(*audit.Entry) error) error {
	const day = 24 * time.Hour
	for at := from.UTC().Truncate(day).Add(-day); !at.After(to.Add(day)); at = at.Add(day) {
		found, err := store.FindRef(ctx, dayRef(what, at), maxFiled)
		if err != nil {
			return err
		}
		for _, sequence := range found {
			row, err := store.Row(ctx, sequence)
			if err != nil {
				return err
			}
			e, err := audit.ParseEntry(row.DER)
			if err != nil {
				return err
			}
			if err := fn(e); err != nil {
				return err
			}
		}
	}
	return nil
}

// maxFiled bounds what one day has of a kind: an alarm takes seconds to be raised again.
const maxFiled = 100_000

// A ServiceHour is what patrols of later sum up: what was refused, how much room was left.
type ServiceHour struct {
	From     time.Time                `json:"from"` // UTC; zero: time was not known
	To       time.Time                `json:"to"`
	Refused  map[problem.Code]uint64  `json:"refused"` // requests, by code
	Entries  uint64                   `json:"entries"` // of the journal, at the end
	Lag      uint64                   `json:"lag"`     // of the central database, at the end
	Free     uint64                   `json:"free_bytes"`
	Total    uint64                   `json:"total_bytes"` // of the journal's volume
	Machines map[string]machineTotals `json:"machines"`    // operations in the hour
}

// A machineTotals is what a machine did in an hour.
type machineTotals struct {
	Done      int64   `json:"done"`
	Failed    int64   `json:"failed"`
	LatencyMS float64 `json:"latency_ms"` // the worst slot's moving mean, at the end
}

// serviceHours closes the hours of the service. One goroutine's.
type serviceHours struct {
	a       *Appliance
	hour    hourly
	from    time.Time
	refused map[problem.Code]uint64 // when the last hour ended
	worked  map[string]machineTotals
	waiting []audit.Draft
}

// look ends the hour when it is over.
func (h *serviceHours) look(ctx context.Context) {
	now, boot := h.a.clock.Now(), h.a.sys.Boot()
	if h.hour.due == 0 {
		h.hour.due, h.from = boot+ledgerEvery, now.Time
		return
	}
	if h.from.IsZero() {
		h.from = now.Time
	}
	if h.hour.ended(boot, now.Time) {
		h.close()
	}
	h.write(ctx)
}

// end is the last look: an hour in which nothing was refused leaves no entry then.
func (h *serviceHours) end(ctx context.Context) {
	if !maps.Equal(h.a.server.Refusals(), h.refused) {
		h.close()
	}
	h.write(ctx)
}

func (h *serviceHours) close() {
	now := h.a.clock.Now().Time.UTC()
	one := ServiceHour{
		From: h.from.UTC(), To: now, Refused: map[problem.Code]uint64{}, Entries: h.a.journal.Size(), Lag: h.a.projection.status().Lag, Machines: map[string]machineTotals{},
	}
	total := h.a.server.Refusals()
	for code, n := range total {
		if n > h.refused[code] {
			one.Refused[code] = n - h.refused[code]
		}
	}
	h.refused = total
	var fs syscall.Statfs_t
	if syscall.Statfs(h.a.dir, &fs) == nil {
		one.Total = fs.Blocks * uint64(fs.Bsize)
	}
	one.Free, _ = h.a.journal.FreeBytes() // 0 says enough
	worked := map[string]machineTotals{}
	for _, m := range h.a.machines.states() {
		var all machineTotals
		for _, s := range m.Slots {
			all.Done, all.Failed, all.LatencyMS = all.Done+s.Done, all.Failed+s.Failed, max(all.LatencyMS, s.LatencyMS)
		}
		worked[m.Name] = all
		all.Done, all.Failed = all.Done-h.worked[m.Name].Done, all.Failed-h.worked[m.Name].Failed
		one.Machines[m.Name] = all
	}
	h.worked, h.from = worked, now
	body, err := json.Marshal(one)
	if err != nil {
		h.a.log.WithError(err).Error("the hour of the service could not be written down")
		return
	}
	if len(h.waiting) >= changesKept {
		return
	}
	h.waiting = append(h.waiting, audit.Draft{
		Kind: kindServiceHour, Actor: "appliance", Object: h.a.cfg.Node, Ref: dayRef(kindServiceHour, h.a.time.day(now)),
		Payloads: []audit.Attachment{{Name: "hour", MediaType: "application/json", Data: body}},
	})
}

func (h *serviceHours) write(ctx context.Context) {
	for len(h.waiting) > 0 && h.a.journal.SealedTo() >= h.a.journal.Size() {
		if _, err := h.a.journal.Append(ctx, h.waiting[0]); err != nil {
			if ctx.Err() == nil && !errors.Is(err, audit.ErrClosed) {
				h.a.log.WithError(err).Error("the hour of the service could not be journalled; it is tried again")
			}
			return
		}
		h.waiting = h.waiting[1:]
	}
}
