// Package link hands DM's driver to yinjian/dbdriver/dm.
package link

import (
	"database/sql"
	"errors"
	"fmt"
	"os"

	driver "gitee.com/chunanyong/dm"

	"yinjian/dbdriver/dm"
)

// name is the driver's, in database/sql.
const name = "dm"

func init() {
	refuseStandIn()
	dm.Link(dm.Driver{
		Name: name,
		Code: func(err error) (int32, bool) {
			var e *driver.DmError
			if !errors.As(err, &e) {
				return 0, false
			}
			return e.ErrCode, true
		},
		RegisterDial: func(name string, dial dm.DialFunc) { driver.RegisterDialContext(name, dial) },
	})
}

// refuseStandIn ends a program that was built with the stand-in for the driver.
func refuseStandIn() {
	db, err := sql.Open(name, "dm://standin:standin@127.0.0.1:1")
	if err != nil {
		return // the driver itself says so when it is used
	}
	defer db.Close()
	if s, ok := db.Driver().(interface{ StandIn() string }); ok {
		fmt.Fprintln(os.Stderr, "此程序以占位模块代替 DM 驱动构建，只供编译检查，拒绝启动 (built with a stand-in for DM's driver, refuses to start):", s.StandIn())
		os.Exit(1)
	}
}
