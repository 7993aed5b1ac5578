package wire

// Settings is a change of config.toml, and of the files of the folder secrets that it names: the body of POST
// /admin/v1/settings/check.
type Settings struct {
	Overlay []byte       `json:"overlay"`           // TOML: keys of config.toml and their new values; at most 64 KiB
	Remove  []string     `json:"remove,omitempty"`  // keys that go out of it, as "tsa.upstream"
	Secrets []SecretFile `json:"secrets,omitempty"` // at most 16
}

// A SecretFile is a file of the folder secrets: a password, a PIN, a CA's certificate.
type SecretFile struct {
	Name   string `json:"name"`
	Secret []byte `json:"secret"` // shown to nobody; at most 16 KiB
}

// A SettingChange is a key of config.toml, or a file of the folder secrets, before and after; what could be a secret is not shown.
type SettingChange struct {
	Key string `json:"key"`
	Old string `json:"old"`
	New string `json:"new"`
}

// CheckedSettings is what a change would make.
type CheckedSettings struct {
	Base    string          `json:"base"` // SM3 of config.toml as it is
	Changes []SettingChange `json:"changes"`
	// Confirm says that somebody has to confirm after the restart that administrators still reach the appliance.
	Confirm bool `json:"confirm"`
}

// ChangeSettings is the body of POST /admin/v1/settings: a change, and what was answered of it, which whoever approves looks at. It is
// refused when it would do anything else.
type ChangeSettings struct {
	Settings Settings        `json:"settings"`
	Base     string          `json:"base"`
	Changes  []SettingChange `json:"changes"`
	Reason   string          `json:"reason"`
	Persons  []string        `json:"persons,omitempty"`
}

func (c *ChangeSettings) ConfirmedBy() *[]string { return &c.Persons }

// DecideSettings is the body of POST /admin/v1/settings/{cancel,restart,confirm}.
type DecideSettings struct {
	Reason string `json:"reason"`
}

// SettingsStatus is the answer of GET /admin/v1/settings.
type SettingsStatus struct {
	Config string `json:"config"` // config.toml as it is read, without what could be a secret
	SM3    string `json:"sm3"`    // of config.toml
	// Waiting is what the next start tries; absent when nothing does.
	Waiting *SettingsChange `json:"waiting,omitempty"`
	// Trial is what this start tries, until it has proved itself.
	Trial *SettingsChange `json:"trial,omitempty"`
	// Left is what was tried last and left again, until it is cancelled or another change is approved.
	Left *SettingsChange `json:"left,omitempty"`
}

// A SettingsChange is one that was approved.
type SettingsChange struct {
	By      string          `json:"by"`
	Reason  string          `json:"reason"`
	Changes []SettingChange `json:"changes"`
	Before  string          `json:"before"` // SM3 of config.toml before
	After   string          `json:"after"`  // and with it
	Confirm bool            `json:"confirm"`
	// LeftS is how long there is still to confirm; absent where nothing waits for it.
	LeftS int `json:"left_s,omitempty"`
	// Why is why it was left.
	Why string `json:"why,omitempty"`
}
