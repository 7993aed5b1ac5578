package main

import (
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// crossed is the folder that cross wrote.
func crossed(t *testing.T) string {
	t.Helper()
	out := os.Getenv("YINJIAN_CROSS")
	if out == "" {
		t.Skip("YINJIAN_CROSS is not set: make cross builds for other architectures and tries what it built")
	}
	return out
}

// Each program is of its architecture; those without cgo ask for no library and no loader.
func TestCrossed(t *testing.T) {
	out := crossed(t)
	machines := map[string]elf.Machine{"arm64": elf.EM_AARCH64, "loong64": elf.EM_LOONGARCH}
	total := 0
	for arch, machine := range machines {
		files, err := filepath.Glob(filepath.Join(out, arch, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			total++
			f, err := elf.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			loader := false
			for _, p := range f.Progs {
				loader = loader || p.Type == elf.PT_INTERP
			}
			libraries, err := f.ImportedLibraries()
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Base(file)
			linked := name == "yinjian" || name == "libyinjian-p11.so"
			if f.Machine != machine || (len(libraries) > 0) != linked || loader != (name == "yinjian") {
				t.Errorf("%s/%s is for %v, asks for %q, loader %v", arch, name, f.Machine, libraries, loader)
			}
		}
	}
	if total != 2*len(static)+2*len(whole) {
		t.Errorf("%d programs", total)
	}
}

// foreign registers qemu for arm64 programs, in a user namespace whose binfmt_misc is its own (Linux 6.7), and becomes the
// program that it is given: whatever that starts of its own kind runs too, and nothing of it is left on this machine.
const foreign = `mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
printf '%s' ':yinjian-arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' > /proc/sys/fs/binfmt_misc/register
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
exec "$@"`

func onARM(argv ...string) *exec.Cmd {
	return exec.Command("unshare", append([]string{"--user", "--map-root-user", "--mount", "sh", "-ec", foreign, "sh"}, argv...)...)
}

// The whole appliance of arm64 under qemu: its power-on tests, the software cipher machine with its module, a record
// signed, stamped and judged; then the static verifiers of arm64 and loong64, which judge its evidence, and a changed document.
func TestCrossAppliance(t *testing.T) {
	out := crossed(t)
	program := filepath.Join(out, "arm64", "yinjian")
	if text, err := onARM(program, "--help").CombinedOutput(); err != nil {
		t.Skipf("arm64 programs do not run here (qemu-user-static, libc6-arm64-cross, Linux 6.7): %v: %s", err, text)
	}
	dir, api := filepath.Join(t.TempDir(), "arm"), freePort(t)
	run := func(argv ...string) string {
		t.Helper()
		text, err := onARM(append([]string{program}, argv...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, text)
		}
		return string(text)
	}
	run("init", "--dir", dir, "--node", "arm-1", "--campus", "本部", "--listen", api, "--time-source", timeServer(t))
	serve := onARM(program, "serve", "--dir", dir)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	serve.Stdout, serve.Stderr = log, log
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = serve.Process.Signal(syscall.SIGTERM)
		if err := serve.Wait(); err != nil {
			t.Errorf("serve: %v", err)
		}
		if text, err := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%s %v", text, err)
		}
	})
	wait(t, "the appliance", func() error {
		text, err := onARM(program, "status", "--dir", dir, "-o", "json").CombinedOutput()
		var state struct{ State string }
		if err == nil {
			err = json.Unmarshal(text, &state)
		}
		if err != nil || state.State != "operational" {
			return fmt.Errorf("%q %v %s", state.State, err, text)
		}
		return nil
	})
	run("app", "register", "emr", "--dir", dir, "--name", "电子病历", "--campus", "本部", "--consent", "app-asserted")
	run("signer", "enrol", "D0001", "--dir", dir, "--name", "陈医师", "--department", "胸外科", "--campus", "本部", "--algorithms", "SM2")
	b := &business{url: "https://" + api}
	b.credential(t, filepath.Join(dir, "credentials", "emr.json"))
	began := time.Now()
	_, evidence := b.sign(t, "n-1", false)
	t.Logf("signed, stamped and judged in %v", time.Since(began).Round(time.Millisecond))

	work := t.TempDir()
	for name, data := range map[string][]byte{"evidence.json": evidence, "document": content("n-1"), "other": content("n-2")} {
		if err := os.WriteFile(filepath.Join(work, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The SM2, SM3 and SM4 of loong64 are written for processors with vectors (LSX), which QEMU 7.2 is none of.
	plain := filepath.Join(work, "loong64-verify")
	build := exec.CommandContext(t.Context(), "go", "build", "-tags", "purego", "-o", plain, "./appliance/cmd/yinjian-verify")
	build.Dir, build.Env = "../..", append(os.Environ(), "GOOS=linux", "GOARCH=loong64", "CGO_ENABLED=0", "GOFLAGS=")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	for qemu, verifier := range map[string]string{"qemu-aarch64-static": filepath.Join(out, "arm64", "yinjian-verify"), "qemu-loongarch64-static": plain} {
		for document, want := range map[string]int{"document": 0, "other": 1} {
			cmd := exec.CommandContext(t.Context(), qemu, verifier, "--anchors", dir, "--log-key", filepath.Join(dir, "log.pem"),
				"--document", filepath.Join(work, document), filepath.Join(work, "evidence.json"))
			if text, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != want {
				t.Errorf("%s, %s: %v, want exit %d\n%s", qemu, document, err, want, text)
			}
		}
	}
}
