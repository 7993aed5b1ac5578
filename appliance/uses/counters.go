package uses

import (
	"context"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
)

// KindCounter names a key whose signatures, by the cipher machine's own count, are not those that the workers recorded.
const KindCounter = "uses.counter"

// Past is the reason of such an entry when no end of a process explains it: somebody with the PIN, or the machine itself.
const Past = "signed past the worker, or the count was changed (绕过工作进程签名，或计数被改动)"

// countersEvery is how often the cipher machine's counts are read while the appliance runs; it lists all keys.
const countersEvery = 10 * time.Minute

// A reading is what the cipher machine said of one slot's keys, and how often the log had them used just before and just
// afterwards: what was signed between the two may be in the machine's count or not.
type reading struct{ machine, before, log map[string]uint64 }

// A Difference is one key whose two counts have moved apart.
type Difference struct {
	Slot    string `json:"slot"`
	Key     string `json:"key"`
	Machine uint64 `json:"machine"` // the cipher machine's count
	Log     uint64 `json:"log"`     // the workers' count
	More    int64  `json:"more"`    // by how many the first is ahead of what it should be; negative: behind
	Reason  string `json:"reason"`
}

// readCounters asks the cipher machine, when it is time. Its answers are judged when what was under way is in the log.
func (r *Reconciler) readCounters(ctx context.Context) (map[string]*reading, error) {
	if r.cfg.Append == nil || r.cfg.Counters == nil || !r.counted.IsZero() && time.Since(r.counted) < countersEvery { // interval
		return nil, nil
	}
	out := map[string]*reading{}
	for _, name := range r.slots {
		if err := r.read(name); err != nil {
			return nil, err
		}
		before := r.logged(name)
		counts, err := r.cfg.Counters(ctx, name)
		if err != nil {
			r.cfg.Log.WithError(err).WithField("slot", name).Warning("the cipher machine's counts of uses were not read; they are next time")
			continue
		}
		if counts != nil {
			out[name] = &reading{machine: counts, before: before}
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

// logged is how often the log has each key of a slot used, as far as it was read.
func (r *Reconciler) logged(name string) map[string]uint64 {
	out := map[string]uint64{}
	for key, c := range r.st.Slots[name].Keys {
		out[key] = c.Uses
	}
	return out
}

// judgeCounters compares the counts. At the first pass of a start, the slots that nobody uses yet are judged at once;
// otherwise a key is judged one pass later: exactly if it was not used meanwhile, for then nothing was under way, and
// with a margin of what can be under way if it was.
func (r *Reconciler) judgeCounters(fresh map[string]*reading) {
	for _, name := range r.slots {
		s := r.st.Slots[name]
		now := r.logged(name)
		if p := s.pending; p != nil {
			for key := range p.machine {
				margin := int64(0)
				if now[key] != p.log[key] {
					margin = int64(r.cfg.Sessions(name))
				}
				r.judge(name, key, p, margin)
			}
			s.pending, s.Based, s.Crashes = nil, true, 0
		}
		p := fresh[name]
		if p == nil {
			continue
		}
		p.log = now
		if r.counted.IsZero() && slices.Contains(r.cfg.Idle, name) {
			for key := range p.machine {
				r.judge(name, key, p, 0)
			}
			s.Based, s.Crashes = true, 0
		} else {
			s.pending = p
		}
		s.Counts = s.Counts || len(p.machine) > 0
	}
	if fresh != nil {
		r.counted = time.Now() // interval
	}
}

// judge compares one key's two counts. At the slot's first comparison it learns by how much they are apart: keys may be
// older than the log.
func (r *Reconciler) judge(name, key string, p *reading, margin int64) {
	s, machine, log := r.st.Slots[name], p.machine[key], p.log[key]
	c := s.Keys[key]
	if c == nil {
		if machine == 0 {
			return
		}
		c = &Count{}
		s.Keys[key] = c
	}
	more := int64(machine) - int64(log) - c.Offset
	if more < 0 {
		more = min(0, more+int64(log-p.before[key])) // what was signed between
	}
	if !s.Based {
		if more != 0 {
			c.Offset, r.moved = c.Offset+more, true
		}
		return
	}
	if more > 0 {
		more = max(0, more-margin)
	} else if margin > 0 {
		more = 0 // the log was read later
	}
	if more == 0 {
		return
	}
	d := Difference{Slot: name, Key: key, Machine: machine, Log: log, More: more, Reason: Past}
	// A worker that was killed took what it was signing with it: made, and not recorded. A power cut takes the log's last
	// second besides; what came of it has entries. It may put a count back, too.
	if lost := more - int64(s.Crashes*r.cfg.Sessions(name)); s.Crashes > 0 && lost <= int64(r.orphans) {
		d.Reason = Ended
		r.orphans -= uint64(max(0, lost)) // each explains one key's
	}
	r.apart = append(r.apart, d)
}

// nameCounters journals the differences, each once.
func (r *Reconciler) nameCounters(ctx context.Context) error {
	for len(r.apart) > 0 {
		d := r.apart[0]
		_, err := r.cfg.Append(ctx, audit.Draft{
			Kind: KindCounter, Actor: "appliance", Object: d.Slot,
			Fields: []audit.Field{
				{Name: "key", Value: audit.Text(d.Key)}, {Name: "machine", Value: audit.Int(d.Machine)}, {Name: "log", Value: audit.Int(d.Log)},
				{Name: "more", Value: audit.Int(d.More)}, {Name: "reason", Value: audit.Text(d.Reason)},
			},
		})
		if err != nil {
			return err
		}
		r.apart = r.apart[1:]
		c := r.st.Slots[d.Slot].Keys[d.Key]
		c.Offset += d.More
		c.Elsewhere += d.More
		r.moved = true
		log := r.cfg.Log.WithFields(logrus.Fields{"slot": d.Slot, "object": d.Key, "machine": d.Machine, "log": d.Log, "more": d.More, "reason": d.Reason})
		if d.Reason == Ended {
			log.Warning("the cipher machine signed for a worker that ended")
			continue
		}
		r.st.Alarms++
		log.Error("ALARM: the cipher machine counts other uses of a key than the workers recorded")
	}
	return nil
}
