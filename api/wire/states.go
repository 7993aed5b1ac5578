package wire

// Unlock is the body of POST /admin/v1/unlock: one holder's passphrase, of the number that the sealed PINs need.
type Unlock struct {
	Holder     string `json:"holder"`
	Passphrase string `json:"passphrase"`
}

// Unlocked is the answer: how many of the passphrases needed were given by now. With as many as are needed the appliance goes
// on with its start.
type Unlocked struct {
	Given     []string `json:"given"` // by whom
	Threshold int      `json:"threshold"`
	Opened    bool     `json:"opened"`
}

// Provision is the body of POST /admin/v1/provision: the answers of `yinjian init --answers`, as TOML, and the passphrases of
// the holders that they name, in that order.
type Provision struct {
	Answers     []byte   `json:"answers"`
	Passphrases []string `json:"passphrases,omitempty"`
}

// RetryStart is the body of POST /admin/v1/start: the start that failed is tried again now.
type RetryStart struct{}

// Provisioned is the answer to POST /admin/v1/provision.
type Provisioned struct {
	State string `json:"state"`
	// Administrators are the first three, where the answers name them, with the passwords of their first login: told once.
	Administrators []FirstPassword `json:"administrators,omitempty"`
}

// A FirstPassword is good for one login, which has to set another.
type FirstPassword struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Role     string `json:"role"`
	Password string `json:"password"`
}

// SealUnlock is the body of POST /admin/v1/unlock/seal: from the next start on this machine's TPM unlocks.
type SealUnlock struct {
	Reason  string   `json:"reason"`
	Persons []string `json:"persons"` // two, where nobody logs in; 1–64 bytes each
}

// UnsealUnlock is the body of POST /admin/v1/unlock/unseal: people unlock again.
type UnsealUnlock struct {
	Reason string `json:"reason"`
}
