package build

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"yinjian/iso/layout"
	"yinjian/iso/screen"
)

// overlays are the folders of the sources that go into the image, and where to. What packaging has is the same on
// servers that install the packages; iso/rootfs is the image's alone.
var overlays = []struct{ from, to string }{
	{"packaging/systemd", "usr/lib/systemd/system"},
	{"packaging/sysctl", "usr/lib/sysctl.d"},
	{"packaging/modprobe", "usr/lib/modprobe.d"},
	{"packaging/nftables/yinjian.nft", "etc/nftables.conf"},
	{"packaging/time/chrony-nmea.conf", "etc/chrony/chrony-nmea.conf"},
	{"packaging/time/chrony-pps.conf", "etc/chrony/chrony-pps.conf"},
	{"iso/rootfs", ""},
}

// links are made here, since not everything that carries sources carries links: what systemd starts (the medium's command line
// names another), the time of the day that people read, and the name servers of the answers.
var links = map[string]string{
	"usr/lib/systemd/system/default.target": "multi-user.target",
	"etc/localtime":                         "/usr/share/zoneinfo/PRC",
	"etc/resolv.conf":                       "/run/yinjian/resolv.conf",
}

// assemble makes the root of what the base's packages have, our programs and the overlays.
func assemble(cfg *Config, b *Base, t Tree, k *kernel, modules []string, programs map[string][]byte, keys Keys) error {
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		t.Folder("usr/"+dir, 0o755, "made")
		t.Symlink(dir, "usr/"+dir, "made")
	}
	for _, o := range overlays {
		if err := t.AddFolder(filepath.Join(cfg.Sources, o.from), o.to); err != nil {
			return err
		}
	}
	for name, to := range links {
		t.Symlink(name, to, "made")
	}
	for name, data := range programs {
		t.Put(name, 0o755, data, "yinjian="+cfg.Version)
	}
	for _, link := range b.Enable {
		// An instance of a template is a link to the template.
		name := path.Base(link)
		if template, _, ok := strings.Cut(name, "@"); ok {
			name = template + "@" + path.Ext(name)
		}
		if t["usr/lib/systemd/system/"+name] == nil {
			return fmt.Errorf("enable: there is no unit %s", name)
		}
		t.Symlink("etc/systemd/system/"+link, "/usr/lib/systemd/system/"+name, "made")
	}

	// What the packages' scripts would have made.
	var bundle bytes.Buffer
	for _, name := range t.Names() {
		if strings.HasPrefix(name, "usr/share/ca-certificates/mozilla/") && strings.HasSuffix(name, ".crt") {
			bundle.Write(t[name].Data)
			delete(t, name)
		}
	}
	if bundle.Len() > 0 {
		t.Put("etc/ssl/certs/ca-certificates.crt", 0o644, bundle.Bytes(), "made")
	}
	if err := k.install(t, modules); err != nil {
		return err
	}

	image := b.image(cfg.Version, cfg.Index, cfg.Variant, cfg.Revision)
	text, err := json.MarshalIndent(image, "", "\t")
	if err != nil {
		return err
	}
	t.Put(strings.TrimPrefix(layout.ImageFile, "/"), 0o644, append(text, '\n'), "made")
	public, err := publicPEM(keys.PCR.Public())
	if err != nil {
		return err
	}
	t.Put(strings.TrimPrefix(layout.PCRKey, "/"), 0o644, public, "made")
	if public, err = publicPEM(keys.Release.Public()); err != nil {
		return err
	}
	t.Put(strings.TrimPrefix(layout.ReleaseKey, "/"), 0o644, public, "made")
	t.Put("usr/lib/os-release", 0o644, []byte(osRelease(image)), "made")
	t.Symlink("etc/os-release", "../usr/lib/os-release", "made")
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "var", "root", "data"} {
		t.Folder(dir, 0o755, "made")
	}
	if cfg.Overlay != "" {
		if err := t.AddFolder(cfg.Overlay, ""); err != nil {
			return err
		}
	}
	// Packages leave folders behind of which nothing is kept; and times and owners are the packer's to set.
	return errors.Join(link(t, cfg.offered, b.Libraries), unaccounted(t))
}

// osRelease is what the boot menu and the console show.
func osRelease(i layout.Image) string {
	name := "印鉴 Yinjian"
	if i.Variant == layout.Evaluation {
		name += "（评估版，含软件密码机，未经认证 evaluation, software cipher machine, not certified）"
	}
	return fmt.Sprintf("NAME=\"Yinjian\"\nID=yinjian\nPRETTY_NAME=\"%s %s\"\nVERSION_ID=%s\nIMAGE_ID=yinjian\nIMAGE_VERSION=%d\nVARIANT_ID=%s\nVARIANT=\"%s\"\n",
		name, i.Version, i.Version, i.Index, i.Variant, i.Variant)
}

// screenFont is the part of GNU Unifont that the screen needs. It is GPL-2+ and its own source, as it was there.
func screenFont(f *File) (*File, error) {
	lines, err := screen.Select(f.Data)
	if err == nil {
		_, err = screen.ParseFont(lines)
	}
	return &File{Mode: 0o644, Data: lines, Source: f.Source}, err
}

// initramfs holds init, the modules that it loads before there is a root and their order, and the screen's font, if there is one.
func initramfs(k *kernel, init []byte, font *File, names []string) ([]byte, error) {
	t := Tree{}
	for _, dir := range []string{"dev", "proc", "sys", "run", "sysroot", "medium"} {
		t.Folder(dir, 0o755, "made")
	}
	t.Put("init", 0o755, init, "made")
	if font != nil {
		t.Put(strings.TrimPrefix(layout.ScreenFont, "/"), 0o644, font.Data, font.Source)
	}
	var order strings.Builder
	for _, name := range names {
		data, err := k.plain(k.module[name])
		if err != nil {
			return nil, err
		}
		t.Put("modules/"+name+".ko", 0o644, data, k.source)
		order.WriteString(name + ".ko\n")
	}
	t.Put("modules/order", 0o644, []byte(order.String()), "made")
	return initrd(t)
}

// keeper is the base's allow-list as a function, and what of it nothing was found for.
func keeper(b *Base) (keep func(string) bool, unused func() error, err error) {
	type rule struct {
		glob  string
		match func(string) bool
		used  bool
	}
	var rules []*rule
	for _, glob := range b.Keep {
		re, err := pattern(glob)
		if err != nil {
			return nil, nil, err
		}
		rules = append(rules, &rule{glob: glob, match: re.MatchString})
	}
	keep = func(name string) bool {
		i := slices.IndexFunc(rules, func(r *rule) bool { return r.match(name) })
		if i >= 0 {
			rules[i].used = true
		}
		return i >= 0
	}
	unused = func() error {
		var errs []error
		for _, r := range rules {
			if !r.used {
				errs = append(errs, fmt.Errorf("keep: nothing matches %q", r.glob))
			}
		}
		return errors.Join(errs...)
	}
	return keep, unused, nil
}
