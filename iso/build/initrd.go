package build

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io/fs"
)

// initrd packs a tree as the kernel's initramfs: cpio in the format "newc" (Documentation/driver-api/early-userspace/
// buffer-format.rst), gzip around it. Inode numbers count, times are zero, all is root's.
func initrd(t Tree) ([]byte, error) {
	var out bytes.Buffer
	z := gzip.NewWriter(&out) // the best level takes six times as long for a third of a percent
	at, inode := 0, 0
	write := func(b []byte) {
		n, _ := z.Write(b) // a bytes.Buffer takes everything
		at += n
	}
	pad := func() { write(make([]byte, (4-at%4)%4)) }
	entry := func(name string, mode uint32, links int, data []byte) {
		inode++
		write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0))
		write([]byte(name + "\x00"))
		pad()
		write(data)
		pad()
	}
	for _, name := range t.Names() {
		f := t[name]
		perm := uint32(f.Mode.Perm())
		switch f.Mode.Type() {
		case fs.ModeDir:
			entry(name, 0o040000|perm, 2, nil)
		case fs.ModeSymlink:
			entry(name, 0o120777, 1, []byte(f.Link))
		default:
			entry(name, 0o100000|perm, 1, f.Data)
		}
	}
	entry("TRAILER!!!", 0, 1, nil)
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
