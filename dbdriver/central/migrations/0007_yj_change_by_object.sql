-- review: central-0007
-- makes: index yj_change_by_object
CREATE INDEX yj_change_by_object ON yj_change (object_id, changed_at_us)
