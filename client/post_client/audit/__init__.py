"""Audits"""
