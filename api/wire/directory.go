package wire

import "time"

// DirectoryStatus is the answer of GET /admin/v1/directory: what is wrong between the two campuses, object by object.
type DirectoryStatus struct {
	Peer    string     `json:"peer,omitempty"` // the other appliance; "" without a pairing
	Heard   *time.Time `json:"heard,omitempty"`
	AgeMS   int64      `json:"age_ms,omitempty"`
	Stale   bool       `json:"stale,omitempty"`
	Centre  string     `json:"centre,omitempty"` // why the central database decides nothing now; "" when it does
	Objects int        `json:"objects"`
	Frozen  []string   `json:"frozen,omitempty"`
	Waiting []string   `json:"waiting,omitempty"`
	Open    []string   `json:"open,omitempty"`
	// Blocked are objects of which the central database has a version that is not here.
	Blocked []BlockedObject `json:"blocked,omitempty"`
}

// A BlockedObject has a version in the central database of which neither journal says anything yet.
type BlockedObject struct {
	Kind    string    `json:"kind"`
	ID      string    `json:"id"`
	Version int64     `json:"version"` // the next one here
	Latest  int64     `json:"latest"`
	Node    string    `json:"node"` // whose name that version bears
	At      time.Time `json:"at"`
}

// SkipVersions is the body of POST /admin/v1/directory/skip: the versions of an object that the central database has, and no
// journal, have no change of their own.
type SkipVersions struct {
	Kind   string `json:"kind"`   // "application", "signer", "certificate", "anchor", "intermediates", "administrator"
	ID     string `json:"id"`     // 1–128 bytes
	Reason string `json:"reason"` // 1–256 bytes
}

// ThawObject is the body of POST /admin/v1/directory/thaw: an end to a fork. The object becomes what it is at the campus that is
// asked, stopped, at both.
type ThawObject struct {
	Kind   string `json:"kind"`   // as in SkipVersions
	ID     string `json:"id"`     // 1–128 bytes
	Reason string `json:"reason"` // 1–256 bytes
}

// ThawedObject is its answer.
type ThawedObject struct {
	Version int64 `json:"version"`
}

// SkippedVersions is the answer to SkipVersions.
type SkippedVersions struct {
	First int64 `json:"first"`
	Last  int64 `json:"last"`
}
