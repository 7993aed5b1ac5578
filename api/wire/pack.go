package wire

// InstallPack is the body of POST /admin/v1/packs/install.
type InstallPack struct {
	SM3     string   `json:"sm3"` // of the staged pack's manifest, 64 hex digits: what two persons have compared
	Reason  string   `json:"reason"`
	Persons []string `json:"persons,omitempty"`
}

func (c *InstallPack) ConfirmedBy() *[]string { return &c.Persons }

// RemovePack is the body of POST /admin/v1/packs/remove.
type RemovePack struct {
	Name    string   `json:"name"`
	Reason  string   `json:"reason"`
	Persons []string `json:"persons,omitempty"`
}

func (c *RemovePack) ConfirmedBy() *[]string { return &c.Persons }

// RegisterPackKey is the body of POST /admin/v1/packs/key.
type RegisterPackKey struct {
	Key     []byte   `json:"key"` // the hospital's public SM2 key, PKIX in PEM
	Reason  string   `json:"reason"`
	Persons []string `json:"persons,omitempty"`
}

func (c *RegisterPackKey) ConfirmedBy() *[]string { return &c.Persons }
