package build

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const bases = "../bases"

// Every base file can be read; its lock, where it has one, names its packages and no others.
func TestBases(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(bases, "*.toml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		b, err := LoadBase(file)
		if err != nil {
			t.Error(err)
			continue
		}
		if _, _, err := keeper(b); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		lock, err := ReadLock(strings.TrimSuffix(file, ".toml") + ".lock")
		if os.IsNotExist(err) && !b.Tried {
			continue // nobody had its repository yet
		}
		if err != nil {
			t.Error(err)
			continue
		}
		locked := map[string]bool{}
		for _, p := range lock {
			if locked[p.Name] {
				t.Errorf("%s: %s is locked twice", file, p.Name)
			}
			locked[p.Name] = true
		}
		for _, name := range b.Packages {
			if !locked[name] {
				t.Errorf("%s: %s is not locked", file, name)
			}
		}
		if len(lock) != len(b.Packages)+1 { // and the kernel
			t.Errorf("%s: %d packages, %d locked", file, len(b.Packages), len(lock))
		}
	}
}

func TestLoadBaseRefuses(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(bases, "debian12.toml"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"unknown key":    {"tried = true", "tryed = true"},
		"other name":     {`name = "debian12"`, `name = "debian13"`},
		"unknown hash":   {`verity_hash = "sha256"`, `verity_hash = "md5"`},
		"unknown format": {`format = "deb"`, `format = "apk"`},
		"unknown arch":   {`arch = "amd64"`, `arch = "pdp11"`},
		"over the slot":  {"root_budget_mib = 57", "root_budget_mib = 65"},
		"not a pattern":  {`"CONFIG_EFI=y"`, `"CONFIG_(EFI=y"`},
	} {
		if !strings.Contains(string(text), change[0]) {
			t.Fatalf("%s: debian12.toml has no %s", name, change[0])
		}
		file := filepath.Join(t.TempDir(), "debian12.toml")
		os.WriteFile(file, []byte(strings.Replace(string(text), change[0], change[1], 1)), 0o600)
		if _, err := LoadBase(file); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// A base that is like another has what that one has but for what it says itself; and it has its own to prove.
func TestLike(t *testing.T) {
	t.Parallel()
	amd64, err := LoadBase(filepath.Join(bases, "debian12.toml"))
	if err != nil {
		t.Fatal(err)
	}
	text := "name = \"other\"\nlike = \"debian12\"\narch = \"arm64\"\ninit_modules = [\"virtio_blk\"]\n"
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	whole, err := os.ReadFile(filepath.Join(bases, "debian12.toml"))
	if err != nil {
		t.Fatal(err)
	}
	write("debian12.toml", string(whole))
	write("other.toml", text)
	b, err := LoadBase(filepath.Join(dir, "other.toml"))
	if err != nil {
		t.Fatal(err)
	}
	want := *amd64
	want.Name, want.Like, want.Arch, want.Tried, want.InitModules = "other", "debian12", "arm64", false, []string{"virtio_blk"}
	if !reflect.DeepEqual(*b, want) {
		t.Errorf("got %+v\nwant %+v", *b, want)
	}
	write("third.toml", strings.Replace(strings.Replace(text, "other", "third", 1), "debian12", "other", 1))
	write("itself.toml", strings.Replace(strings.Replace(text, "other", "itself", 1), "debian12", "itself", 1))
	write("nobody.toml", strings.Replace(strings.Replace(text, "other", "nobody", 1), "debian12", "debian99", 1))
	for _, name := range []string{"third", "itself", "nobody"} {
		if _, err := LoadBase(filepath.Join(dir, name+".toml")); err == nil || !strings.Contains(err.Error(), "like") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A kernel that cannot do what the base wants stops the build, and says what is missing.
func TestCheckKernel(t *testing.T) {
	t.Parallel()
	b, err := LoadBase(filepath.Join(bases, "debian12.toml"))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, line := range append(b.Assert, "CONFIG_CRYPTO_SHA256=m", "CONFIG_CRYPTO_AES=y", "CONFIG_DM_VERITY=m", "CONFIG_DM_CRYPT=m",
		"CONFIG_SQUASHFS=m", "CONFIG_SQUASHFS_ZSTD=y", "CONFIG_SQUASHFS_XZ=y", "CONFIG_CRYPTO_XTS=m", "CONFIG_RD_GZIP=y") {
		all = append(all, strings.ReplaceAll(line, "[ym]", "m"))
	}
	config := strings.Join(all, "\n") + "\n"
	if err := b.checkKernel([]byte(config)); err != nil {
		t.Fatal(err)
	}
	for _, line := range all {
		name, _, _ := strings.Cut(line, "=")
		if err := b.checkKernel([]byte(strings.Replace(config, line+"\n", "# "+name+" is not set\n", 1))); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", line, err)
		}
	}
	// Debian's kernel has neither SM3 nor SM4: a base that wants them must not be built with it.
	domestic := *b
	domestic.VerityHash, domestic.LUKSCipher, domestic.LUKSKeyBits = "sm3", "sm4-xts-plain64", 256
	err = domestic.checkKernel([]byte(config + "# CONFIG_CRYPTO_SM3_GENERIC is not set\n# CONFIG_CRYPTO_SM4_GENERIC is not set\n"))
	if err == nil || !strings.Contains(err.Error(), "SM3") || !strings.Contains(err.Error(), "SM4") {
		t.Errorf("SM3 and SM4 on Debian's kernel: %v", err)
	}
	if err := domestic.checkKernel([]byte(config + "CONFIG_CRYPTO_SM3_GENERIC=m\nCONFIG_CRYPTO_SM4_GENERIC=m\n")); err != nil {
		t.Error(err)
	}
}

func TestReadLock(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "x.lock")
	sum := strings.Repeat("ab", 32)
	for text, good := range map[string]bool{"# x\nlibc6=2.36-9+deb12u14=" + sum + "\n": true, "a=1:2~3-4=" + sum: true,
		"libc6=2.36\n": false, "libc6=1=" + sum + " \n": false, "../x=1=../../etc\n": false, "\n": false} {
		os.WriteFile(file, []byte(text), 0o600)
		if list, err := ReadLock(file); (err == nil) != good {
			t.Errorf("%q: %v, %v", text, list, err)
		}
	}
}
