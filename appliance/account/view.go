package account

import (
	"slices"
	"time"
)

// A SignerView is a signer as an administrator may see one: without what the PIN is verified by.
type SignerView struct {
	Version    int         `json:"version"`
	ID         string      `json:"id"`
	Name       string      `json:"name"`
	Department string      `json:"department"`
	Campus     string      `json:"campus"`
	Role       string      `json:"role,omitempty"`
	Test       bool        `json:"test,omitempty"`
	Keys       []SignerKey `json:"keys"`
	HasPIN     bool        `json:"has_pin"`
	// Custody says what opens the signer's custody keys: "pin", "token" (no PIN: the cipher machine alone), or "" without any.
	Custody   string `json:"custody,omitempty"`
	PINLocked bool   `json:"pin_locked"` // for an application, or for all
	// PINLockedFor names those applications, in order; "*" stands for all.
	PINLockedFor []string  `json:"pin_locked_for,omitempty"`
	Stopped      bool      `json:"stopped"`
	ChangedBy    string    `json:"changed_by"`
	ChangedAt    time.Time `json:"changed_at"`
}

// View answers what may be shown of a signer.
func (s *Service) View(g *Signer) *SignerView {
	v := &SignerView{
		Version: g.Version, ID: g.ID, Name: g.Name, Department: g.Department, Campus: g.Campus, Role: g.Role, Test: g.Test, Keys: slices.Clone(g.Keys),
		HasPIN: g.PIN != nil, Stopped: g.Stopped, ChangedBy: g.ChangedBy, ChangedAt: g.ChangedAt,
	}
	for i := range v.Keys {
		v.Keys[i].Wrapped = nil // nobody needs to see it
	}
	if g.Sealing != nil {
		v.Custody = map[bool]string{true: "pin", false: "token"}[g.Sealing.PIN]
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := 0
	for application, n := range s.pinFailures[g.ID] {
		all += n
		if n >= MaxPINTries {
			v.PINLockedFor = append(v.PINLockedFor, application)
		}
	}
	slices.Sort(v.PINLockedFor)
	if all >= MaxPINTriesAll {
		v.PINLockedFor = []string{"*"}
	}
	v.PINLocked = len(v.PINLockedFor) > 0
	return v
}
