package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm2"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/pack"
)

func packCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "pack", Short: "厂商包：打包、签名、安装、移除 (makers' packs: make, sign, install, remove)",
		Long: `密封设备不能装软件：厂商的 PKCS#11 库、带 DM 驱动的程序，打成一个文件，由发布方与医院各签一次，设备核验后只读挂载。
What a maker delivers for the sealed appliance is one file, signed by whoever builds the appliance and by the hospital; the appliance
judges it and mounts it read-only.`})
	c.AddCommand(packCreateCommand(), packSignCommand(), packShowCommand(), packVerifyCommand(), packStageCommand())
	var install wire.InstallPack
	var remove wire.RemovePack
	var key wire.RegisterPackKey
	persons := func(c *cobra.Command, p *[]string) {
		c.Flags().StringArrayVar(p, "confirmed-by", nil, "核对人，给两次，记入日志；登录后不必 (who has compared it, twice; not after a login)")
	}
	c.AddCommand(
		shown("list", "已装、待装的厂商包 (packs that are installed, and the one that waits)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.ListPacks(ctx) }, printPacks),
		shown("install", "安装上传的厂商包；须两人 (install what was sent)", func(c *cobra.Command) {
			required(c, &install.SM3, "sm3", "清单的 SM3，与发布方公布的核对 (SM3 of the pack's manifest)")
			required(c, &install.Reason, "reason", "原因，记入日志 (why, for the journal)")
			persons(c, &install.Persons)
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
			return a.InstallPack(ctx, install)
		}, printPack("已安装 (installed)")),
		shown("remove", "移除没有密码机使用的厂商包；须两人 (remove a pack that no cipher machine uses)", func(c *cobra.Command) {
			required(c, &remove.Name, "name", "名称 (its name)")
			required(c, &remove.Reason, "reason", "原因，记入日志 (why, for the journal)")
			persons(c, &remove.Persons)
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.RemovePack(ctx, remove) }, printPack("已移除 (removed)")),
		adminCommand("key FILE", "登记医院的 SM2 公钥，一次，不能更换；须两人 (register the hospital's public key, once)", 1, func(c *cobra.Command) {
			required(c, &key.Reason, "reason", "原因，记入日志 (why, for the journal)")
			persons(c, &key.Persons)
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			var err error
			if key.Key, err = os.ReadFile(args[0]); err != nil {
				return nil, err
			}
			return a.RegisterPackKey(ctx, key)
		}),
	)
	return c
}

func packCreateCommand() *cobra.Command {
	var content pack.Content
	var daemon pack.Daemon
	var out string
	var env []string
	m := &content.Manifest
	c := &cobra.Command{Use: "create FILE…", Short: "打包；FILE 可写作 包内路径=文件 (make a pack; FILE may be path-in-the-pack=file)", Args: cobra.ArbitraryArgs,
		Long: `库所需而映像里没有的库一并打包；C 库是映像的，不打包。--env 的值里 {pack} 是挂载的目录，{state} 是库可写的目录。需要 mksquashfs（squashfs-tools）。
Libraries that it needs and the image has not are packed as well; the C library is the image's.`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("没有给出文件 (no file is given)")}
			}
			content.Sources = map[string]string{}
			for _, arg := range args {
				name, file, ok := strings.Cut(arg, "=")
				if !ok {
					name, file = filepath.Base(arg), arg
				}
				if content.Sources[name] != "" {
					return usageError{fmt.Errorf("%s 给出两次 (given twice)", name)}
				}
				content.Sources[name] = file
			}
			for _, v := range env {
				name, value, ok := strings.Cut(v, "=")
				if !ok {
					return usageError{fmt.Errorf("--env %s：须为 NAME=VALUE", v)}
				}
				m.Environment = append(m.Environment, pack.Variable{Name: name, Value: value})
			}
			if daemon.Program != "" {
				m.Daemon = &daemon
			} else if daemon.Ready != "" || len(daemon.Arguments) > 0 {
				return usageError{errors.New("--daemon-arg、--daemon-ready 属于 --daemon (belong to --daemon)")}
			}
			var made *pack.Manifest
			err := writeWhole(out, func(w io.Writer) (err error) {
				made, err = pack.Create(c.Context(), w, content)
				return err
			})
			if err != nil {
				return err
			}
			fmt.Printf("已打包 (packed): %s %s %s，%d 个文件，映像 %d KiB\n下一步 (next): yinjian pack sign %s --by release --key …\n", made.Name, made.Version, made.Arch, len(made.Files), made.Image.Size>>10, out)
			return nil
		}}
	f := c.Flags()
	required(c, &m.Kind, "kind", "pkcs11（密码机的库）或 dm（带 DM 驱动的本程序） (pkcs11 or dm)")
	required(c, &m.Name, "name", "名称，配置里用：小写字母、数字、- _ (its name in the configuration)")
	required(c, &m.Version, "version", "厂商的版本 (the maker's version)")
	required(c, &m.Maker, "maker", "厂商 (who has made it)")
	f.Uint64Var(&m.Serial, "serial", 0, "序号，同名的包只升不降；必填 (grows with each pack of this name; required)")
	_ = c.MarkFlagRequired("serial")
	f.StringVar(&m.Library, "library", "", "pkcs11：库在包内的路径 (the module's path in the pack)")
	f.StringVar(&m.Program, "program", "", "dm：程序在包内的路径 (the program's path in the pack)")
	f.StringVar(&m.Product, "product", "", "dm：程序的版本，须与映像相同 (the program's version, which has to be the image's)")
	f.StringVar(&m.Arch, "arch", "", "架构，缺省由库认出 (architecture; default: the library's)")
	f.StringVar(&m.Notes, "notes", "", "说明，给批准的管理员看 (words for who approves it)")
	f.StringArrayVar(&env, "env", nil, "库所在进程与守护进程的环境变量 NAME=VALUE (environment of the process that loads it, and of the daemon)")
	f.StringVar(&daemon.Program, "daemon", "", "库所需的守护进程在包内的路径，须在前台运行 (path of the daemon that the library needs; it has to stay in the foreground)")
	f.StringArrayVar(&daemon.Arguments, "daemon-arg", nil, "它的参数，依次；可有 {pack}、{state} (its arguments, in order)")
	f.StringVar(&daemon.Ready, "daemon-ready", "", "它就绪时才有的文件或套接字，{state}/… (what is there once it is ready)")
	f.StringArrayVar(&content.System, "system", nil, "映像里已有、不打包的库，如 libstdc++.so.6 (a library of the image's own)")
	f.StringVar(&content.Verity, "verity", "sha256", "校验树的散列，与映像内核的相同：sha256 或 sm3 (hash of the tree, which the image's kernel has)")
	required(c, &out, "out", "写出的文件 (file to write)")
	return c
}

// writeWhole writes a file that is there whole or not at all.
func writeWhole(name string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // once it is renamed there is none
	err = write(f)
	if err == nil {
		err = errors.Join(f.Chmod(0o644), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func packSignCommand() *cobra.Command {
	var u ukey
	var by, keyFile, signature string
	c := &cobra.Command{Use: "sign PACK", Short: "签名，写回包中 (sign a pack, into its file)", Args: exactArgs(1),
		Long: `密钥在 UKey 或密码机里（--module），在文件里（--key），或签名已在别处做成（--signature，DER；被签的内容用 pack show --signed 写出）。
The key is in a UKey or cipher machine, in a file, or the signature was made elsewhere.`,
		RunE: func(c *cobra.Command, args []string) error {
			if by != pack.ByRelease && by != pack.ByHospital {
				return usageError{fmt.Errorf("--by %s：须为 release 或 hospital (must be release or hospital)", by)}
			}
			p, image, err := openPack(args[0])
			if err != nil {
				return explain(err)
			}
			defer image.Close()
			var value []byte
			switch {
			case signature != "":
				value, err = os.ReadFile(signature)
			case u.module != "":
				value, err = u.signed(c.Context(), func(context.Context) ([]byte, error) { return pack.Signed(p.Raw), nil })
			case keyFile != "":
				var key *sm2.PrivateKey
				if key, err = readSM2Private(keyFile); err == nil {
					value, err = key.Sign(rand.Reader, pack.Signed(p.Raw), sm2.DefaultSM2SignerOpts)
				}
			default:
				err = usageError{errors.New("给出 --module、--key 或 --signature (give one of them)")}
			}
			if err != nil {
				return err
			}
			signatures := append(slices.DeleteFunc(p.Signatures, func(s pack.Signature) bool { return s.By == by }), pack.Signature{By: by, Value: value})
			err = writeWhole(args[0], func(w io.Writer) error {
				if err := pack.WriteHead(w, p.Raw, signatures); err != nil {
					return err
				}
				return p.CopyImage(w, image)
			})
			if err != nil {
				return explain(err)
			}
			fmt.Printf("已签名 (signed) %s：%s %s，清单 SM3 %s\n", by, p.Manifest.Name, p.Manifest.Version, p.SM3)
			return nil
		}}
	u.add(c)
	required(c, &by, "by", "release（发布方）或 hospital（医院） (whose key it is)")
	c.Flags().StringVar(&keyFile, "key", "", "SM2 私钥文件，PKCS#8 PEM，权限 600 (file with the private key)")
	c.Flags().StringVar(&signature, "signature", "", "别处做成的签名，DER (a signature that was made elsewhere)")
	c.MarkFlagsMutuallyExclusive("module", "key", "signature")
	return c
}

// openPack reads a pack's head; the reader stands at the image.
func openPack(name string) (*pack.Pack, *os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	p, err := pack.Head(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return p, f, nil
}

func packShowCommand() *cobra.Command {
	var output, signed string
	c := &cobra.Command{Use: "show PACK", Short: "显示包的清单，不核验签名 (show what a pack says; its signatures are not judged)", Args: exactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		p, image, err := openPack(args[0])
		if err != nil {
			return explain(err)
		}
		defer image.Close()
		if signed != "" {
			return os.WriteFile(signed, pack.Signed(p.Raw), 0o644)
		}
		if output == "json" {
			_, err := os.Stdout.Write(p.Raw)
			return err
		}
		m, t := p.Manifest, &columns{to: os.Stdout}
		fmt.Fprintf(t, "名称 name\t%s（%s）\n版本 version\t%s，序号 %d\n厂商 maker\t%s\n架构 arch\t%s\n清单 SM3\t%s\n映像 image\t%d 字节，SM3 %s\n", m.Name, m.Kind, m.Version, m.Serial, m.Maker, m.Arch, p.SM3, m.Image.Size, m.Image.SM3)
		for _, v := range m.Environment {
			fmt.Fprintf(t, "环境 environment\t%s=%s\n", v.Name, v.Value)
		}
		for _, f := range m.Files {
			main := ""
			if f.Path == m.Library || f.Path == m.Program {
				main = " *"
			}
			fmt.Fprintf(t, "文件 file%s\t%s，%d 字节，SM3 %s\n", main, f.Path, f.Size, f.SM3)
		}
		for _, s := range p.Signatures {
			fmt.Fprintf(t, "签名 signature\t%s（未核验 not judged）\n", s.By)
		}
		if m.Notes != "" {
			fmt.Fprintf(t, "说明 notes\t%s\n", strings.ReplaceAll(m.Notes, "\n", " "))
		}
		t.flush()
		return nil
	}}
	c.Flags().StringVarP(&output, "output", "o", "text", "text 或 json (text or json)")
	c.Flags().StringVar(&signed, "signed", "", "把被签的内容写到文件 (write what is signed to a file)")
	return c
}

func packVerifyCommand() *cobra.Command {
	var release, hospital string
	c := &cobra.Command{Use: "verify PACK", Short: "像设备那样核验签名与每个字节 (judge signatures and every byte, as the appliance does)", Args: exactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		var keys pack.Keys
		var err error
		if keys.Release, err = readSM2Public(release); err != nil {
			return err
		}
		if keys.Hospital, err = readSM2Public(hospital); err != nil {
			return err
		}
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		p, err := pack.Whole(f, keys)
		if err != nil {
			return explain(err)
		}
		fmt.Printf("有效 (valid)：%s %s，清单 SM3 %s\n", p.Manifest.Name, p.Manifest.Version, p.SM3)
		return nil
	}}
	required(c, &release, "release-key", "发布方的 SM2 公钥 (release key)")
	required(c, &hospital, "hospital-key", "医院的 SM2 公钥 (hospital's key)")
	return c
}

func packStageCommand() *cobra.Command {
	var f adminFlags
	c := &cobra.Command{Use: "stage PACK", Short: "上传厂商包，核验后待装 (send a pack; nothing uses it yet)", Args: exactArgs(1), RunE: func(c *cobra.Command, args []string) error {
		answer, err := f.send(c.Context(), args[0], (*client.Admin).StagePack)
		if err != nil {
			return err
		}
		if f.output == "json" {
			return f.show(answer)
		}
		var p pack.Installed
		if err := json.Unmarshal(answer, &p); err != nil {
			return err
		}
		printPack("已核验，待装 (judged, and waits)")(os.Stdout, &p)
		fmt.Printf("下一步 (next): yinjian pack install --dir %s --sm3 %s --reason …\n", f.dir, p.SM3)
		return nil
	}}
	f.add(c)
	return c
}

func printPack(what string) func(io.Writer, *pack.Installed) {
	return func(w io.Writer, p *pack.Installed) {
		t := &columns{to: w}
		fmt.Fprintf(t, "%s\t\n厂商包 pack\t%s（%s），%s，版本 %s，序号 %d\n清单 SM3\t%s\n说明 notes\t%s\n", what, p.Name, p.Kind, p.Maker, p.Version, p.Serial, p.SM3, p.Notes)
		t.flush()
	}
}

// listedPacks is what the program reads of the list.
type listedPacks struct {
	Packs []struct {
		pack.Installed
		Since  string   `json:"since"`
		By     string   `json:"installed_by"`
		UsedBy []string `json:"used_by"`
	} `json:"packs"`
	Staged   *pack.Installed `json:"staged"`
	Hospital string          `json:"hospital_key"`
}

func printPacks(w io.Writer, l *listedPacks) {
	t := &columns{to: w}
	if l.Hospital == "" {
		fmt.Fprintf(t, "医院的公钥 hospital's key\t没有登记，不能装厂商包 (not registered: no pack can be installed)\n")
	} else {
		fmt.Fprintf(t, "医院的公钥 hospital's key\tSM3 %s\n", l.Hospital)
	}
	for _, p := range l.Packs {
		if p.Fault != "" {
			fmt.Fprintf(t, "%s\t没有挂载 (not mounted)：%s\n", p.Name, p.Fault)
			continue
		}
		uses := strings.Join(p.UsedBy, "、")
		if uses == "" {
			uses = "无 (none)"
		}
		fmt.Fprintf(t, "%s\t%s，%s，版本 %s，序号 %d，%s 起，%s 装；清单 SM3 %s；使用者 (used by) %s\n", p.Name, p.Kind, p.Maker, p.Version, p.Serial, p.Since, p.By, p.SM3, uses)
	}
	if l.Staged != nil {
		fmt.Fprintf(t, "待装 staged\t%s，版本 %s，序号 %d，清单 SM3 %s\n", l.Staged.Name, l.Staged.Version, l.Staged.Serial, l.Staged.SM3)
	}
	t.flush()
}
