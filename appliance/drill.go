package appliance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// MayDrillRestore refuses a disaster's drill beside an appliance whose cipher machine or PINs cannot be beside it.
func MayDrillRestore(c *Config) error {
	if !c.Evaluation.Softtoken {
		return errors.New("这台设备用真正的密码机：演练会使日志密钥给一份分叉的日志签检查点，须在另一台密码机上手工演练，见 docs/backup.md " +
			"(with a real cipher machine a drill would have the log's key sign a fork: it is done by hand, on another machine)")
	}
	if c.HSM.locked() {
		return errors.New("这台设备的口令由持有人或 TPM 解锁（hsm.pin_source = \"unlock\" 或 \"tpm\"），备份里没有：演练的设备无人能启动。请持有人到场，按 docs/backup.md 在另一目录恢复、放回 pins.locked、解锁 " +
			"(the PINs are in no backup: nobody could start the drill's appliance; restore by hand, put pins.locked back, have the holders unlock it)")
	}
	return nil
}

// MakeDrill turns a folder that was restored into one that can run beside its original and reaches nothing of it: its own
// port on the loopback, its own central database, no upstream device, no addresses of lists, no archive by itself, no
// cipher machines but the software one whose store was in the backup. What a later configuration has beside these is left
// out, not taken over. secrets is the folder that the PINs and passphrases are copied from.
func MakeDrill(dir, secrets string) error {
	name := filepath.Join(dir, "config.toml")
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var was Config
	if err := decodeTOML(b, &was); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := MayDrillRestore(&was); err != nil {
		return err
	}
	c := Config{
		Node: was.Node, Campus: was.Campus, Listen: Listen{API: "127.0.0.1:0"}, HSM: was.HSM, Time: was.Time, TSA: TSA{Units: was.TSA.Units},
		Policy: was.Policy, Trust: Trust{Revocation: was.Trust.Revocation}, Preserve: Preserve{Off: true}, Evaluation: was.Evaluation,
	}
	c.HSM.Machines, c.HSM.Weight = nil, 0
	if b, err = toml.Marshal(c); err != nil {
		return err
	}
	if _, err := ParseConfig(b, dir); err != nil {
		return fmt.Errorf("演练的配置 (the drill's configuration): %w", err)
	}
	if err := os.Remove(machinesPath(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeFile(name, b, 0o600); err != nil {
		return err
	}
	entries, err := os.ReadDir(secrets)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(secrets, e.Name()))
		if err != nil {
			return err
		}
		err = writeFile(filepath.Join(dir, "secrets", e.Name()), b, 0o600)
		clear(b)
		if err != nil {
			return err
		}
	}
	return nil
}
