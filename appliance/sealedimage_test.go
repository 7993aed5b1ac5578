package appliance_test

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"testing/fstest"

	"yinjian/appliance"
	"yinjian/iso/layout"
)

// A host counts as sealed by a release image under Secure Boot alone; everything else is said to be what it is.
func TestSealedImage(t *testing.T) {
	t.Parallel()
	image := layout.Image{Version: "1.2.3", Index: 7, Arch: "amd64", Base: "debian12", Variant: layout.Release, VerityHash: "sha256", LUKSCipher: "aes-xts-plain64", LUKSKeyBits: 512, ESPBytes: 64 << 20, SlotBytes: 64 << 20}
	line := layout.CommandLine{Root: layout.Root{Hash: make([]byte, 32), Algorithm: "sha256", DataBlocks: 9, Salt: []byte{1}}, Media: layout.MediaDisk}
	page := func(change func(*layout.Image)) *fstest.MapFile {
		i := image
		change(&i)
		b, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		return &fstest.MapFile{Data: b}
	}
	const variable = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	sealed := fstest.MapFS{
		"run/yinjian-boot.json":      {Data: []byte(`{"media":"disk","disk":"/dev/vda","root":"/dev/vda2","slot":2}`)},
		"usr/lib/yinjian/image.json": page(func(*layout.Image) {}),
		"proc/cmdline":               {Data: []byte(line.String() + " quiet\n")},
		variable:                     {Data: []byte{6, 0, 0, 0, 1}},
	}
	for name, row := range map[string]struct {
		change fstest.MapFS // nil file: away
		said   string       // part of the head, "" for none
		why    string       // part of why it is not shown, "" for shown
		fails  bool
	}{
		"sealed":                  {nil, "7 1.2.3 debian12 release, root 000", "", false},
		"an evaluation image":     {fstest.MapFS{"usr/lib/yinjian/image.json": page(func(i *layout.Image) { i.Variant = layout.Evaluation })}, "evaluation", "评估版", false},
		"Secure Boot off":         {fstest.MapFS{variable: {Data: []byte{6, 0, 0, 0, 0}}}, "Secure Boot off", "安全启动", false},
		"a firmware without it":   {fstest.MapFS{variable: nil}, "Secure Boot unknown", "安全启动", false},
		"a server with packages":  {fstest.MapFS{"run/yinjian-boot.json": nil}, "", "未封闭", false},
		"the installation medium": {fstest.MapFS{"run/yinjian-boot.json": {Data: []byte(`{"media":"iso"}`)}}, "", "未封闭", false},
		"another command line":    {fstest.MapFS{"proc/cmdline": {Data: []byte("root=/dev/sda1")}}, "", "command line", true},
		"a page that is none":     {fstest.MapFS{"usr/lib/yinjian/image.json": {Data: []byte("{}")}}, "", "image", true},
	} {
		files := maps.Clone(sealed)
		for at, f := range row.change {
			if delete(files, at); f != nil {
				files[at] = f
			}
		}
		said, err := appliance.SealedImage(files)
		if (said == "") != (row.said == "") || !strings.Contains(said, row.said) || (err == nil) != (row.why == "") || err != nil && !strings.Contains(err.Error(), row.why) || err != nil && appliance.NotEvidenced(err) == row.fails {
			t.Errorf("%s: %q, %v", name, said, err)
		}
	}
}
