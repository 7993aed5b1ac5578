// Mkimage makes the sealed image and its installation medium: see package iso/build. `make image` runs it.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/iso/build"
	"yinjian/iso/layout"
)

func main() {
	// The trees of a build live in memory once; the collector need not run early.
	debug.SetGCPercent(400)
	if err := command().Execute(); err != nil {
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{Use: "mkimage", Short: "制作封闭镜像 (makes the sealed image)", SilenceUsage: true}
	var base, cache, repos string
	flags := root.PersistentFlags()
	flags.StringVar(&base, "base", "iso/bases/debian12.toml", "基础文件 (base file)")
	flags.StringVar(&cache, "cache", fallback(os.Getenv("YINJIAN_CACHE"), "build/cache"), "软件包缓存 (cache of packages)")
	flags.StringVar(&repos, "repos", "", "rpm：.repo 文件的目录；缺省用本机的 (folder of .repo files; the machine's own by default)")

	var cfg build.Config
	var keys string
	makes := &cobra.Command{Use: "build", Short: "制作 (make it)", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
		cfg.Base, cfg.Cache, cfg.Repos, cfg.Sources = base, cache, repos, "."
		cfg.Log = func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
		return run(cfg, keys)
	}}
	makes.Flags().StringVar(&cfg.Variant, "variant", layout.Evaluation, "evaluation 或 release")
	makes.Flags().Uint64Var(&cfg.Index, "index", 1, "镜像序号，只增不减 (index of the image, never goes back)")
	makes.Flags().StringVar(&cfg.Out, "out", "build/image", "输出目录 (folder for what is made)")
	makes.Flags().Uint64Var(&cfg.MinIndex, "min-index", 0, "升级包：须先运行的最低序号 (update: least index that it installs over)")
	makes.Flags().Uint64Var(&cfg.Floor, "floor", 0, "升级包：可用之后的下限 (update: least index from then on)")
	makes.Flags().StringVar(&cfg.Notes, "notes", "", "升级包：说明，给批准的管理员看 (update: words for who approves it)")
	makes.Flags().StringVar(&cfg.Overlay, "overlay", "", "最后铺上的文件夹，试验用 (folder that goes over the root last, for tests)")
	makes.Flags().BoolVar(&cfg.Quick, "quick", false, "压缩得快而大，试验用 (pack fast and large, for tests)")
	makes.Flags().StringVar(&keys, "keys", "build/image-keys", "签名密钥目录；没有则生成一次性的 (folder of keys; throw-away ones are made where there is none)")

	locks := &cobra.Command{Use: "lock", Short: "按本机的软件源重写锁文件 (write the lock file anew from this machine's sources)", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return lock(base, cache, repos) }}
	root.AddCommand(makes, locks)
	return root
}

func fallback(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}

var version = regexp.MustCompile(`(?m)^const Version = "([^"]+)"$`)

func run(cfg build.Config, keys string) error {
	source, err := os.ReadFile("appliance/appliance.go")
	if err != nil {
		return fmt.Errorf("run it in the repository: %w", err)
	}
	m := version.FindSubmatch(source)
	if m == nil {
		return errors.New("appliance/appliance.go has no Version")
	}
	cfg.Version = string(m[1])
	// Time and revision are the sources', not the day's.
	epoch := fallback(os.Getenv("SOURCE_DATE_EPOCH"), git("log", "-1", "--format=%ct"))
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return fmt.Errorf("no git and no SOURCE_DATE_EPOCH: %w", err)
	}
	cfg.Time = time.Unix(seconds, 0)
	cfg.Revision = fallback(os.Getenv("YINJIAN_REVISION"), git("describe", "--always", "--dirty"))
	if _, err := os.Stat(keys); errors.Is(err, os.ErrNotExist) {
		cfg.Log("生成一次性的签名密钥 making throw-away keys: %s", keys)
		if err := os.MkdirAll(filepath.Dir(keys), 0o755); err != nil {
			return err
		}
		if err := build.MakeKeys(keys, cfg.Time); err != nil {
			return err
		}
	}
	if cfg.Keys, err = build.LoadKeys(keys); err != nil {
		return err
	}
	defer cfg.Keys.Close() // nothing was written to it
	result, err := build.Build(cfg)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", result.Root.PartitionUUID())
	for _, name := range []string{"root.img", "disk.signed.efi", "esp.img", "yinjian.iso", "yinjian.update"} {
		info, err := os.Stat(result.Files[name])
		if err != nil {
			return err
		}
		fmt.Printf("%8.1f MiB  %s\n", float64(info.Size())/(1<<20), result.Files[name])
	}
	return nil
}

func git(args ...string) string {
	out, err := exec.Command("git", args...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

func lock(base, cache, repos string) error {
	b, err := build.LoadBase(base)
	if err != nil {
		return err
	}
	list, err := (&build.Fetcher{Cache: cache, Repos: repos, Base: b}).Lock()
	if err != nil {
		return err
	}
	text := "# 由 mkimage lock 写出：名称=版本=SHA-256 (name=version=SHA-256 of each package)\n"
	for _, p := range list {
		text += p.String() + "\n"
	}
	return os.WriteFile(strings.TrimSuffix(base, ".toml")+".lock", []byte(text), 0o644)
}
