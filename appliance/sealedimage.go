package appliance

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"yinjian/iso/layout"
)

// A sealedImage is what is known here of the image that the system was started from.
type sealedImage struct {
	Image    layout.Image `json:"image"`       // its own page, under the root hash
	Slot     int          `json:"slot"`        // as init has said
	RootHash string       `json:"root_hash"`   // on the kernel's command line
	Secure   string       `json:"secure_boot"` // "on", "off", or "" where the firmware does not say
}

const secureBootVariable = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

// readSealed reads it below root, the file system's; fs.ErrNotExist where the system was not started from an image's disk.
func readSealed(root fs.FS) (*sealedImage, error) {
	text, err := fs.ReadFile(root, layout.BootRecord[1:])
	if err != nil {
		return nil, err
	}
	var b layout.Booted
	if err := json.Unmarshal(text, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", layout.BootRecord, err)
	}
	if b.Media != layout.MediaDisk {
		return nil, fmt.Errorf("started from %s: %w", b.Media, fs.ErrNotExist)
	}
	s := &sealedImage{Slot: b.Slot}
	if text, err = fs.ReadFile(root, layout.ImageFile[1:]); err != nil {
		return nil, err
	}
	if s.Image, err = layout.ParseImage(text); err != nil {
		return nil, err
	}
	if text, err = fs.ReadFile(root, "proc/cmdline"); err != nil {
		return nil, err
	}
	line, err := layout.ParseCommandLine(string(text))
	if err != nil {
		return nil, err
	}
	s.RootHash = hex.EncodeToString(line.Root.Hash)
	if v, err := fs.ReadFile(root, secureBootVariable); err == nil && len(v) == 5 { // UEFI 2.10 §8.2: attributes, then the value
		s.Secure = map[byte]string{0: "off", 1: "on"}[v[4]]
	}
	return s, nil
}

// Sealed says whether the system was started from a sealed image's disk.
func Sealed() bool {
	_, err := readSealed(os.DirFS("/"))
	return err == nil
}

// String is a line for a report's head.
func (s *sealedImage) String() string {
	return fmt.Sprintf("%d %s %s %s, root %s, Secure Boot %s", s.Image.Index, s.Image.Version, s.Image.Base, s.Image.Variant, s.RootHash, map[string]string{"": "unknown"}[s.Secure]+s.Secure)
}

// shown says why it is not evidence of a sealed host, nil if it is.
func (s *sealedImage) shown() error {
	switch {
	case s.Image.Variant != layout.Release:
		return missing("评估版映像，含软件密码机 (an evaluation image, with the software cipher machine)")
	case s.Secure != "on":
		return missing("固件没有说安全启动已打开：内核可能未经校验 (the firmware does not say that Secure Boot is on: nobody may have checked the kernel)")
	}
	return nil
}

// notSealed says it of a system that was not started from an image, or of which that cannot be read.
func notSealed(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return missing("不是从密封映像启动的，宿主系统未封闭 (not started from a sealed image: the host is not sealed)")
	}
	return err
}
