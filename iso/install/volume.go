package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"yinjian/appliance/custody"
	"yinjian/hsm/tpm"
	"yinjian/iso/layout"
)

// A volume is the data partition of a disk that was installed. What makes, opens and seals it are cryptsetup and systemd's
// programs, by run; they never get a key as an argument.
type volume struct {
	image  layout.Image
	device string // of the partition
	secret string // folder in memory, for keys on their way
	run    func(ctx context.Context, input []byte, program string, args ...string) (output []byte, err error)
	con    *console
}

const (
	cryptsetup       = "/usr/sbin/cryptsetup"
	cryptenroll      = "/usr/bin/systemd-cryptenroll"
	attach           = "/usr/lib/systemd/systemd-cryptsetup"
	mkfs             = "/usr/sbin/mkfs.ext4"
	purposeData      = "data-volume" // of the recovery key's shares
	pcrSignature     = "/run/systemd/tpm2-pcr-signature.json"
	tpmDevice        = "/dev/tpmrm0"
	pcrOfKernel      = 11 // measured by systemd-stub; what its signed policy speaks of
	leastPassphrase  = 12
	wrongPassphrases = 3
	recoverySlot     = "7" // of the volume's header; the others are what the volume is sealed to
)

// errLocked means that the volume is there and that nothing at hand opens it.
var errLocked = errors.New("数据卷已锁定 (the data volume is locked)")

// keyFile puts a key into memory for one program and answers what takes it away.
func (v *volume) keyFile(name string, key []byte) (string, func(), error) {
	path := filepath.Join(v.secret, name)
	if err := os.WriteFile(path, key, 0o600); err != nil {
		return "", nil, err
	}
	return path, func() { os.Remove(path) }, nil
}

// strong are the options for a key of 256 random bits: nothing is gained by stretching it.
var strong = []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}

// make formats the volume anew with a random key, which is then sealed and thrown away: to the TPM or a passphrase, and to
// the holders of the recovery key. The volume is left open, by the key.
func (v *volume) make(ctx context.Context, a Answers) error {
	random := make([]byte, 32)
	rand.Read(random)
	key, forget, err := v.keyFile("key", []byte(hex.EncodeToString(random)))
	if err != nil {
		return err
	}
	defer forget()
	format := append([]string{"luksFormat", "--batch-mode", "--type", "luks2", "--cipher", v.image.LUKSCipher,
		"--key-size", fmt.Sprint(v.image.LUKSKeyBits), "--key-file", key}, strong...)
	if _, err := v.run(ctx, nil, cryptsetup, append(format, v.device)...); err != nil {
		return err
	}
	if a.Seal == sealTPM {
		if err := v.sealTPM(ctx, key); err != nil {
			return err
		}
	} else if err := v.sealPassphrase(ctx, key); err != nil {
		return err
	}
	if len(a.Recovery.Holders) > 0 {
		if err := v.share(ctx, key, a.Recovery); err != nil {
			return err
		}
	}
	if _, err := v.run(ctx, nil, cryptsetup, "open", "--key-file", key, v.device, layout.DataName); err != nil {
		return err
	}
	if _, err := v.run(ctx, nil, cryptsetup, "luksRemoveKey", "--batch-mode", v.device, key); err != nil {
		return err
	}
	_, err = v.run(ctx, nil, mkfs, "-q", "-F", "-L", layout.LabelData, layout.DataDev)
	return err
}

// sealTPM gives the volume to this TPM: for whatever kernel has a PCR policy signed by the image's key, so that an update
// opens it too, and for the present keys of Secure Boot (PCR 7).
func (v *volume) sealTPM(ctx context.Context, key string) error {
	if _, err := os.Stat(pcrSignature); err != nil {
		return fmt.Errorf("启动的内核没有附带 PCR 签名，无法封存到 TPM (the kernel that was started brings no signed PCR policy): %w", err)
	}
	v.forgive()
	_, err := v.run(ctx, nil, cryptenroll, "--unlock-key-file="+key, "--tpm2-device=auto", "--tpm2-pcrs=7",
		"--tpm2-public-key="+layout.PCRKey, fmt.Sprintf("--tpm2-public-key-pcrs=%d", pcrOfKernel), v.device)
	return err
}

// forgive is called before the TPM is used: systemd's object counts towards its lock-out, though there is no password to guess,
// and a few power cuts, at whatever point after that, would lock the volume.
func (v *volume) forgive() {
	if err := tpm.ForgiveStarts(tpmDevice); err != nil && !errors.Is(err, tpm.ErrUnavailable) {
		v.con.say("TPM 的防猜计数未能清零：连续几次断电后可能需等待或用恢复密钥 (the TPM counts power cuts as guesses and did not forget them): %v", err)
	}
}

// shut has the TPM give the volume's key to nobody until the machine starts anew: whoever is root later cannot ask for it. It answers
// whether it did; a volume that is not sealed to the TPM has nothing to ask for.
func (v *volume) shut(ctx context.Context) (bool, error) {
	m, err := v.header(ctx)
	if err != nil || !m.tpm() {
		return false, err
	}
	return true, tpm.Extend(tpmDevice, pcrOfKernel, "yinjian: data volume open")
}

func (v *volume) sealPassphrase(ctx context.Context, key string) error {
	var passphrase string
	for {
		text, err := v.con.hidden("\n请设置开机口令，至少十二个字符，不显示 (NEW PASSPHRASE for every start, twelve characters at least, not shown)")
		if err != nil {
			return err
		}
		if len([]rune(text)) < leastPassphrase {
			v.con.say("太短 (too short)")
			continue
		}
		again, err := v.con.hidden("请再输入一次 (ONCE MORE)")
		if err != nil {
			return err
		}
		if again == text {
			passphrase = text
			break
		}
		v.con.say("两次不同 (they differ)")
	}
	_, err := v.run(ctx, []byte(passphrase), cryptsetup, "luksAddKey", "--batch-mode", "--key-file", key, v.device, "-")
	return err
}

// share makes the recovery key and shows each holder's part, to each alone, on the one terminal where Enter was pressed for it,
// for nothing that was typed before it was asked for. It is a key of its own, so that using it tells
// nothing about the TPM's.
func (v *volume) share(ctx context.Context, key string, r Recovery) error {
	secret := make([]byte, custody.SecretSize)
	rand.Read(secret)
	defer clear(secret)
	shares, _, err := custody.Split(secret, purposeData, "first-start", r.Holders, r.Threshold)
	if err != nil {
		return err
	}
	add := append([]string{"luksAddKey", "--batch-mode", "--key-file", key, "--key-slot", recoverySlot}, strong...)
	if _, err := v.run(ctx, []byte(hex.EncodeToString(secret)), cryptsetup, append(add, v.device, "-")...); err != nil {
		return err
	}
	for i := range shares {
		s := &shares[i]
		v.con.fresh()
		v.con.say("\n恢复密钥第 %d 份，请 %s 一人到屏幕前，按回车显示 (RECOVERY SHARE %d: its holder alone, press Enter)", s.Number, s.Holder, s.Number)
		if _, err := v.con.line(); err != nil {
			return err
		}
		here := v.con.here()
		here.fresh()
		here.say("%s", s.String())
		here.say("抄写并核对后按回车，屏幕随即清除 (press Enter when it is written down; the screen is cleared)")
		if _, err := here.line(); err != nil {
			return err
		}
		here.wipe()
		s.Wipe()
	}
	return nil
}

// open opens the volume as it is sealed; [errLocked] when the TPM does not give the key, or nobody the passphrase.
func (v *volume) open(ctx context.Context) error {
	m, err := v.header(ctx)
	if err != nil {
		return err
	}
	if m.tpm() {
		waitForTPM()
		v.forgive()
		if _, err := v.run(ctx, nil, attach, "attach", layout.DataName, v.device, "-", "tpm2-device=auto,headless=true"); err != nil {
			return fmt.Errorf("%w: %w", errLocked, err)
		}
		return nil
	}
	for left := wrongPassphrases; left > 0; {
		text, err := v.con.hidden("\n请输入开机口令，不显示，还可试 %d 次 (PASSPHRASE of the data volume, not shown, %d tries)", left, left)
		if err != nil {
			return err
		}
		if text == "" {
			continue
		}
		_, err = v.run(ctx, []byte(text), cryptsetup, "open", "--key-file", "-", v.device, layout.DataName)
		if err == nil {
			return nil
		}
		// cryptsetup(8): 2 is "no permission (bad passphrase)". Whatever else it says is no fault of whoever typed.
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 {
			return err
		}
		left--
		v.con.say("口令不符 (WRONG PASSPHRASE)")
	}
	return errLocked
}

// A header is what a volume says about its keys, in the clear: LUKS2 metadata, as cryptsetup prints it.
type header struct {
	Keyslots map[string]struct{} `json:"keyslots"`
	Tokens   map[string]struct {
		Type string `json:"type"`
	} `json:"tokens"`
}

// tpm says whether the volume is sealed to a TPM. One that has its recovery key alone was about to be: a passphrase goes
// only when there is another.
func (h *header) tpm() bool {
	for _, t := range h.Tokens {
		if t.Type == "systemd-tpm2" {
			return true
		}
	}
	return len(h.Keyslots) == 1 && h.recovery()
}

// madeToken is in the header from when the volume was made whole: such a one is never made anew.
const madeToken = "yinjian-made"

func (h *header) made() bool {
	for _, t := range h.Tokens {
		if t.Type == madeToken {
			return true
		}
	}
	return false
}

// made says whether the device has a volume that was made whole. What has no header is none, nor is what a power cut left.
func (v *volume) made(ctx context.Context) bool {
	h, err := v.header(ctx)
	return err == nil && h.made()
}

// finish says so in the header.
func (v *volume) finish(ctx context.Context) error {
	_, err := v.run(ctx, []byte(`{"type": "`+madeToken+`", "keyslots": []}`), cryptsetup, "token", "import", "--json-file", "-", v.device)
	return err
}

// recovery says whether the volume has a recovery key.
func (h *header) recovery() bool {
	_, ok := h.Keyslots[recoverySlot]
	return ok
}

func (v *volume) header(ctx context.Context) (*header, error) {
	out, err := v.run(ctx, nil, cryptsetup, "luksDump", "--dump-json-metadata", v.device)
	if err != nil {
		return nil, fmt.Errorf("分区上没有数据卷 (there is no data volume): %w", err)
	}
	h := new(header)
	if err := json.Unmarshal(out, h); err != nil {
		return nil, fmt.Errorf("header of the data volume: %w", err)
	}
	return h, nil
}

// openOrRecover opens the volume, or says why it stays locked and waits for its recovery key, if there is one.
func (v *volume) openOrRecover(ctx context.Context) error {
	err := v.open(ctx)
	if !errors.Is(err, errLocked) {
		return err
	}
	m, herr := v.header(ctx)
	if herr != nil {
		return herr
	}
	why := "三次口令不符。记得口令的，请断电后重新启动再试。\n(three wrong passphrases; whoever knows it switches the machine off and on and tries again)"
	if m.tpm() {
		why = "本机 TPM、固件设置或内核与封存时不同。服务不启动，数据未改动。\n(another TPM, other firmware settings or another kernel than it was sealed to; nothing starts, nothing was changed)"
	}
	v.con.say("\n%s %v\n%s", markLocked, err, why)
	if m.recovery() {
		return v.recover(ctx)
	}
	if m.tpm() {
		return errors.New("没有恢复密钥：恢复原来的主板与固件设置后重新启动，否则重装并由备份恢复 (NO RECOVERY KEY: start it with the mainboard and the firmware settings it was sealed to, or install anew and restore a backup)")
	}
	return errors.New("没有恢复密钥 (NO RECOVERY KEY)")
}

// recover asks for the recovery key's shares until they open the volume, and seals it anew. It ends with an error of the
// console alone.
func (v *volume) recover(ctx context.Context) error {
	var shares []custody.Share
	for {
		v.con.say("\n请持有人逐行输入恢复密钥份额，以空行结束 (RECOVERY: type a share, line by line, and an empty line)；已有 %d 份 (%d so far)", len(shares), len(shares))
		var text strings.Builder
		for {
			line, err := v.con.line()
			if err != nil {
				return err
			}
			if line == "" {
				break
			}
			text.WriteString(line + "\n")
		}
		v.con.wipe()
		s, err := custody.ParseShare(text.String())
		if err != nil {
			v.con.say("%v", err)
			continue
		}
		if slices.ContainsFunc(shares, func(other custody.Share) bool { return other.Number == s.Number }) {
			v.con.say("第 %d 份已经输入 (share %d was typed before)", s.Number, s.Number)
			continue
		}
		shares = append(shares, s)
		if len(shares) < s.Threshold {
			continue
		}
		secret, err := custody.Combine(shares, purposeData)
		shares = nil
		if err == nil {
			err = v.recovered(ctx, []byte(hex.EncodeToString(secret)))
		}
		if err == nil {
			return nil
		}
		v.con.say("打不开，请重新输入 (THESE DO NOT OPEN IT, begin anew): %v", err)
	}
}

// recovered opens the volume by its recovery key and seals it anew: to this machine's TPM, or to another passphrase.
func (v *volume) recovered(ctx context.Context, secret []byte) error {
	key, forget, err := v.keyFile("recovery", secret)
	if err != nil {
		return err
	}
	defer forget()
	if _, err := v.run(ctx, nil, cryptsetup, "open", "--key-file", key, v.device, layout.DataName); err != nil {
		return err
	}
	v.con.say("RECOVERED 数据卷已用恢复密钥打开 (opened by the recovery key)")
	m, err := v.header(ctx)
	switch {
	case err != nil:
	case m.tpm():
		err = v.anotherTPM(ctx, key)
	default:
		err = v.anotherPassphrase(ctx, key, m)
	}
	if err != nil { // it is open all the same: what cannot be mended now is asked for again at the next start
		v.con.say("未能重新封存，下次启动仍需恢复密钥 (NOT SEALED ANEW; the next start asks again): %v", err)
	}
	return nil
}

// anotherTPM seals the volume to this machine's TPM instead of the one before, and opens it once more by that. The old one
// goes first: of two with the same PCR policy systemd-cryptenroll takes the second for the first and does nothing.
func (v *volume) anotherTPM(ctx context.Context, key string) error {
	if _, err := os.Stat(tpmDevice); err != nil {
		return fmt.Errorf("本机没有可用的 TPM，原来的封存不变 (this machine has no TPM; it stays sealed to the one before): %w", err)
	}
	if _, err := v.run(ctx, nil, cryptenroll, "--wipe-slot=tpm2", v.device); err != nil {
		return err
	}
	if err := v.sealTPM(ctx, key); err != nil {
		return err
	}
	if _, err := v.run(ctx, nil, cryptsetup, "close", layout.DataName); err != nil {
		return err
	}
	if err := v.open(ctx); err != nil {
		_, kerr := v.run(ctx, nil, cryptsetup, "open", "--key-file", key, v.device, layout.DataName)
		return errors.Join(err, kerr)
	}
	v.con.say("SEALED 已重新封存到本机 TPM (sealed to this machine's TPM)")
	return nil
}

// anotherPassphrase puts a new passphrase into the place of the one that was forgotten. In between both open the volume,
// should the power go.
func (v *volume) anotherPassphrase(ctx context.Context, key string, before *header) error {
	if err := v.sealPassphrase(ctx, key); err != nil {
		return err
	}
	for slot := range before.Keyslots {
		if slot == recoverySlot {
			continue
		}
		if _, err := v.run(ctx, nil, cryptsetup, "luksKillSlot", "--batch-mode", "--key-file", key, v.device, slot); err != nil {
			return err
		}
	}
	v.con.say("SEALED 口令已更换 (the passphrase was changed)")
	return nil
}
