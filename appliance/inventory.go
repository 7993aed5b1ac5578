package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// A keyLine is one key of the inventory.
type keyLine struct {
	Slot      string `json:"slot,omitempty"` // "" for a key in a file
	Label     string `json:"label"`
	Algorithm string `json:"algorithm"`
	Owner     string `json:"owner,omitempty"` // "": a secret key of the appliance itself, or one that the directory does not know
	Public    string `json:"public,omitempty"`
	// Kind is resident, custody (wrapped, on no token), or file.
	Kind string `json:"kind"`
	KEK  string `json:"kek,omitempty"`
	// State is present, missing (known to the directory and on no machine), unknown (on a machine, and not known to the
	// directory), elsewhere (in another appliance's cipher machine), sealed (a custody key) or destroyed.
	State string `json:"state"`
	Node  string `json:"node,omitempty"` // the other appliance
	// Machines are those that hold the key, or of a custody key those that hold the key it is wrapped under.
	Machines []string `json:"machines"`
	// What the cipher machine says of the key, read back now; of a key that is on none nothing is said.
	Sensitive        *bool   `json:"sensitive,omitempty"`
	Extractable      *bool   `json:"extractable,omitempty"`
	NeverExtractable *bool   `json:"never_extractable,omitempty"`
	AlwaysSensitive  *bool   `json:"always_sensitive,omitempty"`
	Local            *bool   `json:"local,omitempty"`        // it was made there
	Trusted          *bool   `json:"trusted,omitempty"`      // of a key that wraps
	MachineUses      *uint64 `json:"machine_uses,omitempty"` // where the machine counts

	Uses      uint64 `json:"uses"` // as the workers recorded them, as of the last look (some 30 s)
	Born      string `json:"born,omitempty"`
	Activated string `json:"activated,omitempty"`
	Due       string `json:"rotation_due,omitempty"`
	Destroyed string `json:"destroyed,omitempty"`
}

// An inventory is every key that the appliance knows or finds.
type inventory struct {
	Keys []keyLine `json:"keys"`
	// Slots are the machines' tokens, "class/machine".
	Slots    map[string]string `json:"slots"`
	Warnings []string          `json:"warnings"`
	// Next, of a page, is what the next one begins after; "": there is none.
	Next string `json:"next,omitempty"`
}

// ListKeys asks each slot's cipher machine what it holds, and puts it beside what the directory knows.
func (d admin) ListKeys(ctx context.Context, _ string) (any, error) {
	a := d.a
	out := inventory{Keys: []keyLine{}, Slots: map[string]string{}, Warnings: []string{}}
	type place struct {
		class hsm.SlotClass
		label string
	}
	found := map[place]*foundKey{}
	silent := map[hsm.SlotClass]bool{}
	var order []place
	for _, machine := range a.machines.all() {
		for _, class := range hsm.Classes {
			w := machine.workers[class]
			if w == nil {
				continue
			}
			name := string(class) + "/" + machine.Name
			info, err := w.Info(ctx)
			var keys []hsm.KeyInfo
			if err == nil {
				keys, err = w.Keys(ctx)
			}
			if err != nil {
				silent[class] = true
				out.Slots[name] = slotAway
				out.Warnings = append(out.Warnings, notLooked(name, err))
				continue
			}
			out.Slots[name] = fmt.Sprintf("%s %s %s", info.Label, info.Model, info.Serial)
			for _, k := range keys {
				p := place{class, k.Label}
				if found[p] == nil {
					found[p] = &foundKey{KeyInfo: k}
					order = append(order, p)
				}
				found[p].on(machine.Name, k)
			}
		}
	}
	known := map[place]bool{}
	for _, r := range a.directory.KeyRecords() {
		known[place{r.Class, r.Label}] = true
		line := lineOf(r, found[place{r.Class, r.Label}], found[place{r.Class, r.KEK}], silent[r.Class])
		line.Uses = a.accounting.keyUses(string(r.Class), r.Label)
		out.Keys = append(out.Keys, line)
	}
	for _, p := range order {
		if known[p] {
			continue
		}
		k := found[p]
		line := keyLine{Slot: string(p.class), Label: p.label, Algorithm: string(k.Algorithm), Kind: "resident", State: "present", Uses: a.accounting.keyUses(string(p.class), p.label)}
		switch {
		case hsm.IsHealth(p.label):
			line.Owner = "health"
		case k.Public != nil && p.class != hsm.CA: // MAC keys, those that wrap and the CA's are the appliance's own, and in no directory
			line.State = "unknown"
		}
		line.readBack(k)
		out.Keys = append(out.Keys, line)
	}
	out.warn()
	return out, nil
}

// lineOf puts what the directory knows of a key beside what the machines said of it and of the key that it is wrapped under;
// silent: one of them did not answer.
func lineOf(r account.KeyRecord, k, kek *foundKey, silent bool) keyLine {
	line := keyLine{Slot: string(r.Class), Label: r.Label, Algorithm: r.Algorithm, Owner: r.Owner, Public: r.Public, KEK: r.KEK, Node: r.Node,
		Kind: "resident", State: "missing", Machines: []string{}, Born: instant(r.Born), Activated: instant(r.Activated), Due: instant(r.Due), Destroyed: instant(r.Destroyed)}
	switch {
	case r.Class == "":
		line.Kind, line.State = "file", "present"
	case r.KEK != "":
		line.Kind, line.State = "custody", "sealed"
		if kek != nil {
			line.Machines = kek.machines
		}
	case r.Node != "":
		line.State = "elsewhere"
	case k == nil && silent:
		line.State = "unavailable"
	}
	if k != nil {
		line.State = "present"
		line.readBack(k)
	}
	if !r.Destroyed.IsZero() && k == nil {
		line.State = "destroyed"
	}
	return line
}

// SearchKeys answers a page of the keys that the directory knows, and asks the cipher machines for these alone. A key that is
// on a machine and in no directory is in [admin.ListKeys].
func (d admin) SearchKeys(ctx context.Context, _ string, req api.SearchKeys) (any, error) {
	a := d.a
	records, next := a.directory.SearchKeys(account.HeldQuery{Text: req.Text, Scope: req.Scope, After: req.After, Most: pageSize(req.Most)})
	out := inventory{Keys: []keyLine{}, Slots: map[string]string{}, Warnings: []string{}, Next: next}
	silent, asked := map[hsm.SlotClass]bool{}, map[string]*foundKey{}
	look := func(class hsm.SlotClass, label string) *foundKey {
		if class == "" || label == "" {
			return nil
		}
		at := string(class) + "/" + label
		if k, was := asked[at]; was {
			return k
		}
		var found *foundKey
		for _, machine := range a.machines.all() {
			w, name := machine.workers[class], string(class)+"/"+machine.Name
			if w == nil || out.Slots[name] != "" { // not asked again after it did not answer
				continue
			}
			k, err := w.FindKey(ctx, label)
			switch {
			case errors.Is(err, hsm.ErrKeyNotFound):
			case err != nil:
				silent[class], out.Slots[name] = true, slotAway
				out.Warnings = append(out.Warnings, notLooked(name, err))
			case found == nil:
				found = &foundKey{KeyInfo: k}
				fallthrough
			default:
				found.on(machine.Name, k)
			}
		}
		asked[at] = found
		return found
	}
	for _, r := range records {
		var k *foundKey
		if r.KEK == "" { // a wrapped one is on no token
			k = look(r.Class, r.Label)
		}
		kek := look(r.Class, r.KEK)
		line := lineOf(r, k, kek, silent[r.Class])
		line.Uses = a.accounting.keyUses(string(r.Class), r.Label)
		out.Keys = append(out.Keys, line)
	}
	out.warn()
	return out, nil
}

const slotAway = "不可用 (unavailable)"

func notLooked(slot string, err error) string {
	return fmt.Sprintf("%s 不应答，其密钥未核对 (its keys were not looked at): %v", slot, err)
}

// warn says what is wrong with the keys.
func (out *inventory) warn() {
	for _, line := range out.Keys {
		switch {
		case line.State == "missing":
			out.Warnings = append(out.Warnings, fmt.Sprintf("密钥 %s 不在密码机中 (the key is on no machine)", line.Label))
		case line.Destroyed != "" && line.State == "present":
			out.Warnings = append(out.Warnings, fmt.Sprintf("密钥 %s 已记为销毁，密码机尚未删除，设备会自动再试 (recorded as destroyed; the machine has it still)", line.Label))
		case line.Extractable != nil && *line.Extractable, line.Sensitive != nil && !*line.Sensitive:
			out.Warnings = append(out.Warnings, fmt.Sprintf("密钥 %s 可导出或可读 (the key can leave the machine, or be read)", line.Label))
		}
	}
}

// A foundKey is a key as the machines that hold it describe it: of several the worst is said.
type foundKey struct {
	hsm.KeyInfo
	machines []string
}

func (f *foundKey) on(machine string, k hsm.KeyInfo) {
	f.Sensitive, f.Trusted, f.NeverExtractable = f.Sensitive && k.Sensitive, f.Trusted && k.Trusted, f.NeverExtractable && k.NeverExtractable
	f.Extractable = f.Extractable || k.Extractable
	f.AlwaysSensitive, f.Local = worst(f.AlwaysSensitive, k.AlwaysSensitive), worst(f.Local, k.Local)
	if len(f.machines) > 0 && f.Uses != nil && k.Uses != nil {
		sum := *f.Uses + *k.Uses
		f.Uses = &sum
	}
	f.machines = append(f.machines, machine)
}

// worst is true where both are, and nil where one does not say.
func worst(a, b *bool) *bool {
	if a == nil || b == nil {
		return nil
	}
	both := *a && *b
	return &both
}

func (l *keyLine) readBack(k *foundKey) {
	l.Sensitive, l.Extractable, l.NeverExtractable, l.MachineUses, l.Machines = &k.Sensitive, &k.Extractable, &k.NeverExtractable, k.Uses, k.machines
	l.AlwaysSensitive, l.Local = k.AlwaysSensitive, k.Local
	if k.Algorithm == hsm.SM4 {
		l.Trusted = &k.Trusted
	}
}

func instant(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// keyUses is how often a key has signed, as of the last pass.
func (c *accounting) keyUses(class, label string) (n uint64) {
	c.mu.Lock()
	r := c.counts
	c.mu.Unlock()
	if r == nil {
		return 0
	}
	for _, m := range c.a.machines.all() {
		n += r.KeyUses(usesSlot(hsm.SlotClass(class), m.Name))[label]
	}
	return n
}

func (d admin) DestroyKey(ctx context.Context, actor string, req api.DestroyKey) (any, error) {
	// A copy on a machine whose keys nobody has read would go on, and the record would say that the key is gone.
	m := d.a.machines
	m.acts.Lock()
	defer m.acts.Unlock()
	wrapped := slices.ContainsFunc(d.a.directory.KeyRecords(), func(r account.KeyRecord) bool { return r.Label == req.Label && r.KEK != "" })
	if away := m.unread(hsm.Staff); len(away) > 0 && !wrapped {
		return nil, problem.New(problem.HSMUnavailable, fmt.Sprintf("密码机 %s 的密钥尚未读出，其中可能有这把密钥的副本；没有销毁 (a copy may be on a machine whose keys were not read; nothing was destroyed)", strings.Join(away, "、")),
			"待其恢复，或先 yinjian hsm remove；见 yinjian hsm list (wait until it is back, or remove it first)")
	}
	if err := d.a.directory.DestroyKey(ctx, actor, req.Label, req.Reason); err != nil {
		return nil, err
	}
	return map[string]string{"destroyed": req.Label}, nil
}
