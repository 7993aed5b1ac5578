module gitee.com/chunanyong/dm

go 1.26.0
