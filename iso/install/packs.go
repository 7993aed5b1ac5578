package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance/pack"
	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// A packed is a maker's pack that waits behind a parcel: whoever has no other library of a cipher machine has it before there is an
// appliance that could take one. It is judged here, and by the agent that mounts it, at every start.
type packed struct {
	Name    string `json:"name"`
	Library string `json:"library,omitempty"` // of a cipher machine; "" for another kind of pack
	Size    int64  `json:"size"`
	SHA256  []byte `json:"sha256"`
}

// offset is where the i-th pack begins, counted from the parcel; that behind the last is where all of it ends.
func (p *parcel) offset(i int) int64 {
	at := int64(maxParcel)
	for _, one := range p.Packs[:i] {
		at += (one.Size + layout.BlockSize - 1) / layout.BlockSize * layout.BlockSize
	}
	return at
}

// checkPacks refuses what no installer has written.
func (p *parcel) checkPacks() error {
	for i, one := range p.Packs {
		if !pack.Name.MatchString(one.Name) || one.Size <= 0 || one.Size > layout.SlotBytes || len(one.SHA256) != sha256.Size ||
			slices.ContainsFunc(p.Packs[:i], func(other packed) bool { return other.Name == one.Name }) {
			return fmt.Errorf("packs for the first start: %.80q", fmt.Sprint(one))
		}
	}
	return nil
}

// behind has the packs read from where the parcel lies.
func (p *parcel) behind(place io.ReaderAt) {
	p.packs = nil
	for i, one := range p.Packs {
		p.packs = append(p.packs, io.NewSectionReader(place, p.offset(i), one.Size))
	}
}

// findPacks takes the packs of an answer disk into a parcel: each signed by the release key and the hospital's, every byte looked at.
// The files stay open until they are on the disk.
func findPacks(folder string, p *parcel, release []byte, image layout.Image) error {
	found, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	found = slices.DeleteFunc(found, func(e fs.DirEntry) bool { return !strings.EqualFold(filepath.Ext(e.Name()), ".pack") })
	if len(found) == 0 {
		return nil
	}
	if p.Hospital == nil {
		return fmt.Errorf("应答盘上有厂商包而没有 %s：厂商包须有医院的签名 (a pack needs the hospital's signature, and its public key beside it)", hospitalKey)
	}
	keys := &p.keys
	if keys.Hospital, err = update.ParseKey(p.Hospital); err != nil {
		return err
	}
	if keys.Release, err = update.ParseKey(release); err != nil {
		return err
	}
	for _, e := range found {
		err := error(nil)
		if !e.Type().IsRegular() {
			err = errors.New("不是文件 (is no file)")
		} else {
			err = p.addPack(filepath.Join(folder, e.Name()), image)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	if room := p.offset(len(p.Packs)); room > image.SlotBytes {
		return fmt.Errorf("应答盘上的厂商包共 %d MiB，至多 %d MiB；其余的在初始化之后安装 (the packs on the answer disk are too large: install the others afterwards)", (room-maxParcel)>>20, (image.SlotBytes-maxParcel)>>20)
	}
	return nil
}

func (p *parcel) addPack(name string, image layout.Image) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	judged, err := pack.Whole(f, p.keys)
	if err == nil {
		err = judged.Manifest.Fits(image.Arch, image.VerityHash)
	}
	if err == nil && judged.Manifest.Kind == pack.DM && judged.Manifest.Product != image.Version {
		err = fmt.Errorf("程序的版本是 %s，映像的是 %s：不会被运行 (its program is of another version than the image, and would not be run)", judged.Manifest.Product, image.Version)
	}
	if err == nil && slices.ContainsFunc(p.Packs, func(other packed) bool { return other.Name == judged.Manifest.Name }) {
		err = fmt.Errorf("应答盘上有两个名为 %s 的厂商包 (two packs of that name)", judged.Manifest.Name)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	sum := sha256.New()
	_, err = f.Seek(0, io.SeekStart)
	var size int64
	if err == nil {
		size, err = io.Copy(sum, f)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	p.Packs = append(p.Packs, packed{judged.Manifest.Name, judged.Manifest.Library, size, sum.Sum(nil)})
	p.packs = append(p.packs, io.NewSectionReader(f, 0, size))
	return nil
}

// needPacks refuses answers that name a library in a pack that the answer disk has not: nobody could bring it later.
func needPacks(text []byte, packs []packed) error {
	type machine struct {
		Module string `toml:"module"`
	}
	var a struct {
		machine
		Settings struct {
			HSM struct {
				machine
				Machines []machine `toml:"machines"`
			} `toml:"hsm"`
		} `toml:"settings"`
	}
	if err := toml.Unmarshal(text, &a); err != nil {
		return err
	}
	for _, m := range append([]machine{a.machine, a.Settings.HSM.machine}, a.Settings.HSM.Machines...) {
		in, ok := strings.CutPrefix(m.Module, "pack:")
		if !ok {
			continue
		}
		name, library, _ := strings.Cut(in, "/")
		if !slices.ContainsFunc(packs, func(p packed) bool { return p.Name == name && p.Library == library }) {
			return fmt.Errorf("module: 应答盘上没有带库 %s 的厂商包 %s（签过名的 *.pack 文件）(no such pack on the answer disk, or its library is another)", library, name)
		}
	}
	return nil
}

// copyPack copies a pack, and looks whether it is the one that was judged.
func copyPack(to io.Writer, one packed, from *io.SectionReader) error {
	sum := sha256.New()
	if _, err := from.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.Copy(io.MultiWriter(to, sum), from); err != nil {
		return fmt.Errorf("pack %s: %w", one.Name, err)
	}
	if !bytes.Equal(sum.Sum(nil), one.SHA256) {
		return fmt.Errorf("厂商包 %s 读出的与核验时不同：应答盘或硬盘有故障，请重新安装 (what is read of the pack is not what was judged: install again)", one.Name)
	}
	return nil
}

// keepPacks writes the packs to a folder, where their agent looks at them and mounts them.
func (p *parcel) keepPacks(folder string) error {
	if len(p.Packs) == 0 {
		return nil
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	for i, one := range p.Packs {
		f, err := os.OpenFile(filepath.Join(folder, one.Name+".pack"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(copyPack(f, one, p.packs[i]), f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}
