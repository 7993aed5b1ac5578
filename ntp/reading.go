package ntp

import "time"

// A State says how far the appliance's own time can be trusted.
type State string

const (
	Cold      State = "cold"      // no majority of sources yet
	Acquiring State = "acquiring" // sources agree, not yet for long enough
	Trusted   State = "trusted"   // fresh agreement
	Holdover  State = "holdover"  // majority lost; the bound grows
	Untrusted State = "untrusted" // the bound exceeded its ceiling, or holdover lasted too long
	Suspect   State = "suspect"   // a step, a suspend or a jump of the majority was seen
)

// A Reading is the only form of time that evidence may use: what time it is, how wrong that can be, and who says so.
type Reading struct {
	Time  time.Time     // UTC, from the anchor and CLOCK_BOOTTIME, never from CLOCK_REALTIME
	Bound time.Duration // |true time − Time| ≤ Bound, as far as the sources of the majority are honest
	State State
	// Provenance names the groups of sources that agreed, "BDS(beidou)+lan" and the policy that let them, in words that
	// evidence repeats.
	Provenance string
}

// Trusted reports whether the reading may be signed: Trusted or Holdover.
func (r Reading) Trusted() bool { return r.State == Trusted || r.State == Holdover }
