-- review: central-0006
-- makes: index yj_change_by_time
CREATE INDEX yj_change_by_time ON yj_change (changed_at_us)
