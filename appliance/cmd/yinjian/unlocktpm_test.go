package main_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/api"
	"yinjian/appliance"
	"yinjian/hsm/hsmtest"
)

// An appliance whose PINs the TPM opens starts without anybody; where the TPM is another, or its registers are, or the PINs
// are, it stays locked, says why, and its holders unlock it as before.
func TestUnlockByTPM(t *testing.T) {
	t.Parallel()
	chip, other := hsmtest.StartTPM(t), hsmtest.StartTPM(t)
	server := startTimeServer(t)
	dir := filepath.Join(tempDir(t), "a")
	file := filepath.Join(tempDir(t), "answers.toml")
	answers := fmt.Sprintf("node = 'benbu-7'\ncampus = '滨海'\ntime_sources = ['%s']\npin_source = 'tpm'\n[unlock]\nthreshold = 2\nholders = ['张三', '李四', '王五']\n", server.address)
	if err := os.WriteFile(file, []byte(answers), 0o600); err != nil {
		t.Fatal(err)
	}
	words := []string{"sand-and-water-1", "horse-battery-2", "correct-staple-3"}
	if o := says(t, words, "init", "--dir", dir, "--answers", file); o.code != 0 {
		t.Fatalf("init: %v", o)
	}
	configure(t, dir, func(c *appliance.Config) { c.HSM.TPM = &appliance.TPM{Device: chip.Socket, PCRs: []int{11, 7}} })
	var m *machine
	locked := func(why string) standing {
		t.Helper()
		var s standing
		eventually(t, readyWithin, "locked: "+why, func() bool {
			s = m.stands(t, api.Locked)
			return s.Unlock.TPM != nil && strings.Contains(s.Unlock.TPM.Why, why)
		})
		if !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, why) }) {
			t.Errorf("no warning says %q: %v", why, s.Warnings)
		}
		return s
	}
	unlock := func() {
		t.Helper()
		for i, holder := range []string{"张三", "李四"} {
			if o := says(t, words[i:i+1], "unlock", "--dir", dir, "--holder", holder); o.code != 0 {
				t.Fatalf("unlock %s: %v", holder, o)
			}
		}
		m.await(t)
	}
	seal := []string{"unlock", "seal", "--tpm", "--dir", dir, "--reason", "机房无人值守", "--confirmed-by", "张三", "--confirmed-by", "李四"}

	// 1. Nothing is sealed at first; what two persons decide is in the change log, and in no file are the PINs.
	m = launch(t, dir)
	if s := locked("尚未封给 TPM"); s.Unlock.TPM.Sealed {
		t.Errorf("%+v", s.Unlock.TPM)
	}
	unlock()
	m.trusted(t)
	refused(t, 2, []string{"--confirmed-by"}, seal[:len(seal)-2]...)
	mustRun(t, seal...)
	m.changeOf(t, "/admin/v1/unlock/seal", "unlock.tpm", "", "", `"pcrs":"7,11"`)
	if w := m.state(t).Warnings; slices.ContainsFunc(w, func(w string) bool { return strings.Contains(w, "TPM") }) {
		t.Errorf("warned of after it was sealed: %v", w)
	}
	m.stop(t)

	// 2. The machine starts anew: nobody comes, and it signs.
	chip.Restart(t)
	m = launch(t, dir)
	m.await(t)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	if _, err := his.Sign(t.Context(), "one", asserted("D1", "one")); err != nil {
		t.Error(err)
	}
	m.stop(t)

	// 3. Something else was started: locked, and the holders unlock; nothing is lost by that.
	chip.Extend(t, 11)
	m = launch(t, dir)
	locked("PCR 11")
	unlock()
	if w := m.state(t).Warnings; !slices.ContainsFunc(w, func(w string) bool { return strings.Contains(w, "PCR 11") && strings.Contains(w, "unlock seal") }) {
		t.Errorf("the state does not say why nobody will unlock: %v", w)
	}
	m.stop(t)

	// 4. Another machine's TPM; and one that does not answer is asked again.
	chip.Restart(t)
	configure(t, dir, func(c *appliance.Config) { c.HSM.TPM.Device = other.Socket })
	m = launch(t, dir)
	locked("不是封存时的 TPM")
	m.kill(t)
	configure(t, dir, func(c *appliance.Config) { c.HSM.TPM.Device = chip.Socket })
	chip.Stop(t)
	m = launch(t, dir)
	locked("不应答")
	chip.Restart(t)
	m.await(t)
	m.stop(t)

	// 5. Holders were exchanged, and with them the PINs may have been: people come, and seal it anew.
	again := []string{"another-of-zhang", "another-of-li", "another-of-sun"}
	if o := says(t, append(words[:2:2], again...), "unlock", "rekey", "--dir", dir, "--with", "张三", "--with", "李四", "--holder", "张三", "--holder", "李四", "--holder", "孙七"); o.code != 0 {
		t.Fatalf("rekey: %v", o)
	}
	words = again
	m = launch(t, dir)
	locked("之后换过")
	unlock()
	mustRun(t, seal...)
	m.changeOf(t, "/admin/v1/unlock/seal", "unlock.tpm", "", `"file_sm3"`, `"file_sm3"`)
	m.stop(t)
	m = launch(t, dir)
	m.await(t)
	// 6. One person ends it.
	mustRun(t, "unlock", "unseal", "--dir", dir, "--reason", "设备搬迁")
	m.changeOf(t, "/admin/v1/unlock/unseal", "unlock.tpm", "", `"pcrs":"7,11"`, "")
	m.mustBeClean(t)
	m.stop(t)
	m = launch(t, dir)
	locked("尚未封给 TPM")
	m.kill(t)

	var told []string
	for _, e := range entries(t, dir, "appliance.unlocked") {
		told = append(told, fmt.Sprintf("%s %s %s", strings.SplitN(e.Actor, " ", 2)[0], e.Text("holders"), e.Text("tpm")))
	}
	want := []string{"local 张三、李四 refused: 尚未", "appliance  opened", "local 张三、李四 refused: 平台度量已变", "appliance  opened", "local 张三、李四 refused: 口令包", "appliance  opened"}
	if !slices.EqualFunc(told, want, strings.HasPrefix) {
		t.Errorf("the journal says %q\nwant %q", told, want)
	}
}
