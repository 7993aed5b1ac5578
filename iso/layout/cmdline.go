package layout

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Words of the kernel command line. It is a section of the signed kernel image: under Secure Boot nobody else can write
// there, and nothing else is believed about the root. Each may stand once.
const (
	WordRootHash = "roothash"       // hex
	WordVerity   = "yinjian.verity" // algorithm,data blocks,salt in hex
	WordMedia    = "yinjian.media"  // iso or disk
	WordESP      = "yinjian.esp"    // with iso alone: SHA-256 of what the medium's [ESPImage] unpacks to, hex
)

// What the root is read from.
const (
	MediaISO  = "iso"
	MediaDisk = "disk"
)

// A CommandLine is what the signed command line says to init and installer.
type CommandLine struct {
	Root  Root
	Media string
	ESP   [sha256.Size]byte // of what the medium's [ESPImage] unpacks to; zero unless Media is iso
}

// String renders the words that [ParseCommandLine] reads.
func (c CommandLine) String() string {
	words := fmt.Sprintf("%s=%x %s=%s,%d,%x %s=%s",
		WordRootHash, c.Root.Hash, WordVerity, c.Root.Algorithm, c.Root.DataBlocks, c.Root.Salt, WordMedia, c.Media)
	if c.Media == MediaISO {
		words += fmt.Sprintf(" %s=%x", WordESP, c.ESP)
	}
	return words
}

// ParseCommandLine reads a kernel command line. Words of others are passed over; one of ours that is missing, stands
// twice or is not of its form is an error, and whoever boots must stop there.
func ParseCommandLine(text string) (CommandLine, error) {
	found := map[string]string{}
	for word := range strings.FieldsSeq(text) {
		name, value, _ := strings.Cut(word, "=")
		switch name {
		case WordRootHash, WordVerity, WordMedia, WordESP:
			if _, twice := found[name]; twice {
				return CommandLine{}, fmt.Errorf("layout: command line: %s stands twice", name)
			}
			found[name] = value
		}
	}
	var c CommandLine
	fault := func(name string, err error) (CommandLine, error) {
		return CommandLine{}, fmt.Errorf("layout: command line: %s: %w", name, err)
	}
	verity := strings.Split(found[WordVerity], ",")
	if len(verity) != 3 {
		return fault(WordVerity, errors.New("is not algorithm,blocks,salt"))
	}
	c.Root.Algorithm = verity[0]
	var err error
	if c.Root.DataBlocks, err = strconv.ParseUint(verity[1], 10, 64); err != nil {
		return fault(WordVerity, err)
	}
	if c.Root.Salt, err = hex.DecodeString(verity[2]); err != nil {
		return fault(WordVerity, err)
	}
	if c.Root.Hash, err = hex.DecodeString(found[WordRootHash]); err != nil {
		return fault(WordRootHash, err)
	}
	if err := c.Root.Validate(); err != nil {
		return CommandLine{}, err
	}
	switch c.Media = found[WordMedia]; c.Media {
	case MediaDisk:
		if _, there := found[WordESP]; there {
			return fault(WordESP, errors.New("is for the installation medium alone"))
		}
	case MediaISO:
		esp, err := hex.DecodeString(found[WordESP])
		if err != nil || len(esp) != len(c.ESP) {
			return fault(WordESP, errors.New("is not a SHA-256 in hex"))
		}
		copy(c.ESP[:], esp)
	default:
		return fault(WordMedia, fmt.Errorf("%q is neither %s nor %s", c.Media, MediaISO, MediaDisk))
	}
	return c, nil
}
