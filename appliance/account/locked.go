package account

import (
	"maps"
	"slices"
)

// LockedPINs names the signers whose PIN is locked now, each with the applications that it is locked for, in order; "*"
// stands for all. See [Service.View].
func (s *Service) LockedPINs() map[string][]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := map[string][]string{}
	for signer, failures := range s.pinFailures {
		all := 0
		for _, application := range slices.Sorted(maps.Keys(failures)) {
			all += failures[application]
			if failures[application] >= MaxPINTries {
				out[signer] = append(out[signer], application)
			}
		}
		if all >= MaxPINTriesAll {
			out[signer] = []string{"*"}
		}
	}
	return out
}
