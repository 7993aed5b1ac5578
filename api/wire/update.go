package wire

// CommitUpdate is the body of POST /admin/v1/update/commit.
type CommitUpdate struct {
	SM3     string   `json:"sm3"` // of the staged bundle's manifest, 64 hex digits: what two persons have compared
	Reason  string   `json:"reason"`
	Persons []string `json:"persons,omitempty"`
}

func (c *CommitUpdate) ConfirmedBy() *[]string { return &c.Persons }

// RestartForUpdate is the body of POST /admin/v1/update/restart.
type RestartForUpdate struct {
	Reason string `json:"reason"`
}

// CancelUpdate is the body of POST /admin/v1/update/cancel.
type CancelUpdate struct {
	Reason string `json:"reason"`
}
