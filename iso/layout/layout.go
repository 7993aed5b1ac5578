// Package layout says what builder, init, installer and updater of the sealed image must agree on: the words on the
// signed command line, partitions and their table, the shape of the hash tree behind the root, names on media and on the
// EFI system partition, and the page in which an image describes itself. It moves bytes and touches no device.
//
// Documents: UEFI 2.10 §5 (GPT), the UAPI Group's Discoverable Partitions Specification and Boot Loader Specification
// (boot counting), and the dm-verity on-disk format, version 1, as cryptsetup's veritysetup writes it.
package layout

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Names on media, in the image and on the installed disk.
const (
	ISOLabel     = "YINJIAN"    // volume identifier of the installation medium
	AnswersLabel = "YINJIANCFG" // volume label of the disk with the answers, FAT or ISO 9660
	AnswersFile  = "answers.json"

	MediaDir  = "yinjian"    // folder on the installation medium
	RootImage = "root.img"   // in it: squashfs, superblock and hash tree, as a slot holds them
	ESPImage  = "esp.img.gz" // in it: the EFI system partition, without the zeros behind its last cluster, gzip (RFC 1952)

	ImageFile = "/usr/lib/yinjian/image.json" // in the root: an [Image]
	PCRKey    = "/usr/lib/yinjian/pcr.pem"    // in the root: the public key, PKIX, that signs PCR policies

	ReleaseKey = "/usr/lib/yinjian/release.pem" // in the root: the public SM2 key, PKIX, that signs update bundles

	ScreenFont = "/usr/lib/yinjian/screen.hex" // in the root and in the initramfs: the screen's font, see package screen

	DataMount   = "/data"
	Dir         = DataMount + "/yinjian"             // the appliance's folder
	EntryDir    = "EFI/Linux"                        // on the EFI system partition: signed kernels, see [Entry]
	MediaRun    = "/run/media"                       // where init leaves the installation medium mounted
	VerityDev   = "/dev/mapper/root"                 // the root, checked block by block
	DataName    = "data"                             // device mapper's name of the opened data volume
	DataDev     = "/dev/mapper/" + DataName          // the opened data volume
	BootRecord  = "/run/yinjian-boot.json"           // where init leaves a [Booted]
	PacksDir    = DataMount + "/packs"               // makers' packs, as they were signed
	HospitalKey = DataMount + "/update/hospital.pem" // public SM2 key, PKIX, that signs update bundles as well, where there is one
	LeastFile   = DataMount + "/update/least"        // the least image that may start, see [ReadFloor]
	MachineID   = DataMount + "/etc/machine-id"      // kept over updates, since /etc is of the image
	Journal     = DataMount + "/log/journal"         // what systemd-journald keeps
	SlotBytes   = 64 << 20                           // each of the two roots: budget of the root and room to grow
	ESPBytes    = 512 << 20                          // two kernels, the boot loader, a third kernel while it is written
	MinBytes    = ESPBytes + 2*SlotBytes + 4<<30     // of the whole disk
)

// In the initramfs: the folder of modules, and in it the list of their file names in the order of loading.
const (
	ModulesDir   = "/modules"
	ModulesOrder = ModulesDir + "/order"
)

// Variants of an image.
const (
	Evaluation = "evaluation" // holds the software cipher machine, and says so
	Release    = "release"
)

// An Image is what an image says about itself, in [ImageFile] under the root hash. Nothing outside the root is believed
// about these.
type Image struct {
	Version     string `json:"version"`      // of the product
	Index       uint64 `json:"index"`        // of the image: names its kernel, grows with each release, never goes back
	Arch        string `json:"arch"`         // GOARCH
	Base        string `json:"base"`         // name of the base file, such as debian12
	Variant     string `json:"variant"`      // evaluation or release
	VerityHash  string `json:"verity_hash"`  // sha256 or sm3
	LUKSCipher  string `json:"luks_cipher"`  // as cryptsetup takes it: aes-xts-plain64, sm4-xts-plain64
	LUKSKeyBits int    `json:"luks_keybits"` // of both halves of an XTS key
	ESPBytes    int64  `json:"esp_bytes"`    // size of the EFI system partition
	SlotBytes   int64  `json:"slot_bytes"`   // size of each root
	BuiltFrom   string `json:"built_from"`   // revision of the sources
}

// ParseImage reads an [Image]. Unknown members are refused, as are values that nobody here could act on.
func ParseImage(text []byte) (Image, error) {
	var image Image
	d := json.NewDecoder(strings.NewReader(string(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(&image); err != nil {
		return Image{}, fmt.Errorf("layout: image: %w", err)
	}
	return image, image.Validate()
}

// Validate says what in the image's description cannot be.
func (i Image) Validate() error {
	var wrong []string
	say := func(bad bool, what string) {
		if bad {
			wrong = append(wrong, what)
		}
	}
	say(i.Version == "", "version")
	say(i.Index == 0, "index")
	say(!slices.Contains([]string{Evaluation, Release}, i.Variant), "variant")
	say(digest(i.VerityHash) == nil, "verity_hash")
	say(i.LUKSCipher == "", "luks_cipher")
	say(i.LUKSKeyBits != 256 && i.LUKSKeyBits != 512, "luks_keybits")
	say(i.ESPBytes < 32<<20 || i.ESPBytes%Align != 0, "esp_bytes")
	say(i.SlotBytes < 8<<20 || i.SlotBytes%Align != 0, "slot_bytes")
	_, err := RootType(i.Arch)
	say(err != nil, "arch")
	if wrong != nil {
		return fmt.Errorf("layout: image: not usable: %s", strings.Join(wrong, ", "))
	}
	return nil
}

// A Booted is what init tells the system that it starts.
type Booted struct {
	Media string `json:"media"` // MediaISO or MediaDisk
	Disk  string `json:"disk"`  // whole disk, or the installation medium, such as /dev/sda
	Root  string `json:"root"`  // device under verity
	Slot  int    `json:"slot"`  // NumberRootA or NumberRootB; 0 on the installation medium
}

// ReadFloor reads the number of an image, in decimal, from a file: the least that counts. No file is 0.
func ReadFloor(name string) (uint64, error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}
